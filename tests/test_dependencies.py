"""What is declared in pyproject.toml: everything that is imported, within bounds, in versions that are tested."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hotplug.cli import checks

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
BENCHED = {"llama_cpp", "openvino_genai", "vllm"}
"""Peers that benchmarks measure, each in an environment of its own (`make bench-peers`)."""
OPTIONAL = {
    "openvino": "cpu", "triton": "cuda", "pynvml": "cuda", "flashinfer": "flashinfer", "opentelemetry": "otel",
    "pytest": "dev",
}  # fmt: skip
"""Modules that hotplug imports where they are installed, and the extra that brings them."""


def declared(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def imported(*folders: str) -> set[str]:
    """Top names of absolute imports in Python files, but the standard library's and the repository's own."""
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    own = {file.stem for file in files} | {file.parent.name for file in files}
    names: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - own - {"hotplug"}


def undeclared(names: set[str], requirements: dict[str, Requirement]) -> list[str]:
    """Modules that no declared distribution brings. One that is not installed is taken by its own name."""
    brings = packages_distributions() | {"pynvml": ["nvidia-ml-py"], "opentelemetry": ["opentelemetry-api"]}
    return sorted(
        name for name in names if not {canonicalize_name(d) for d in brings.get(name, [name])} & requirements.keys()
    )


def test_everything_that_hotplug_imports_is_declared() -> None:
    names = imported("hotplug")
    assert {"torch", "starlette", "tqdm", "httpx2", "zmq"} <= names
    assert undeclared(names - OPTIONAL.keys(), declared(PROJECT["dependencies"])) == []
    for name, extra in OPTIONAL.items():
        assert undeclared({name} & names, declared(EXTRAS[extra])) == []


def test_everything_that_tests_and_tools_import_is_declared() -> None:
    everything = declared([*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)])
    examples = {path.name for path in (ROOT / "examples").glob("*/*") if (path / "__init__.py").exists()}
    kept = {"toy_kernels"}  # a wheel of interface 1.1 in tests/data
    assert undeclared(imported("tests", "ci", "examples") - BENCHED - examples - kept, everything) == []


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)])
def test_a_requirement_has_a_lower_and_an_upper_bound(line: str) -> None:
    operators = {clause.operator for clause in Requirement(line).specifier}
    assert operators == {">=", "<"}


def test_the_constraints_are_versions_that_are_declared() -> None:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "ci" / "constraints.txt").read_text().splitlines()]
    pins = declared([line for line in lines if line])
    everything = [*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["cuda"], *EXTRAS["dev"]]
    for name, requirement in declared(everything).items():
        assert name in pins, f"{name} is installed in any version"
        (pin,) = pins[name].specifier
        assert requirement.specifier.contains(pin.version), str(requirement)


def test_a_new_installation_has_versions_that_doctor_calls_tested() -> None:
    requirements = declared(PROJECT["dependencies"])
    for name, (low, high) in (("torch", checks.TESTED_TORCH), ("transformers", checks.TESTED_TRANSFORMERS)):
        bounds = {clause.operator: clause.version for clause in requirements[name].specifier}
        assert bounds["<"] == f"{high[0]}.{high[1] + 1}"
        assert tuple(map(int, bounds[">="].split("."))) <= low
