"""examples/toy-eager, installed as a vendor's package would be: found, imported little, equal to the CPU."""

from __future__ import annotations

import ast
import json
import tomllib
from pathlib import Path

import pytest
from prompts import PROMPTS
from throwaway import run_python, write_distribution

import hotplug.vendor

EXAMPLE = Path(__file__).parent.parent / "examples" / "toy-eager"
SOURCES = [EXAMPLE / "pyproject.toml", *sorted((EXAMPLE / "toy_eager").glob("*.py"))]
MOST_LINES, MOST_SYMBOLS = 120, 30

GENERATE = """
import json, sys
from hotplug import LLM, SamplingParams

model, prompts = sys.argv[1], json.loads(sys.argv[2])
params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
found = {}
for device in ("cpu", "toy_eager"):
    llm = LLM(model, device=device, dtype="float32", quantization="none", max_model_len=256, kv_cache_memory="64MiB")
    found[device] = [o.outputs[0].token_ids for o in llm.generate(prompts, params, progress=False)]
    found["providers"] = sorted({c.provider for c in llm.core.bound.kernels.plan.choices})
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package as installed, with its entry point."""
    folder = tmp_path_factory.mktemp("toy-eager")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    modules = {str(p.relative_to(EXAMPLE)): p.read_text() for p in SOURCES if p.suffix == ".py"}
    write_distribution(folder, project["name"], version=project["version"],
                       entry_points=project["entry-points"], modules=modules)  # fmt: skip
    return folder


def test_it_takes_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = sum(1 for file in SOURCES for line in file.read_text().splitlines() if line.strip())
    with capsys.disabled():
        print(f"\ntoy-eager: {lines} lines from empty to first token, pyproject.toml included, blank ones not")
    assert lines < MOST_LINES


def test_it_imports_a_few_vendor_symbols_and_nothing_else_of_hotplug() -> None:
    imports = [n for f in SOURCES[1:] for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.ImportFrom)]
    modules = {n.module for n in imports if (n.module or "").startswith("hotplug")}
    symbols = {alias.name for n in imports if n.module == "hotplug.vendor" for alias in n.names}
    assert modules == {"hotplug.vendor"}
    assert symbols <= set(hotplug.vendor.__all__)
    assert len(symbols) <= MOST_SYMBOLS


def test_devices_lists_it_with_its_distribution(installed: Path) -> None:
    done = run_python(installed, "-m", "hotplug.cli", "devices", "--json")
    assert "toy_eager" in done.stdout, done.stderr
    assert "toy-eager 1.0.0" in done.stdout


def test_its_own_tests_pass(installed: Path) -> None:
    done = run_python(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests"), cwd=installed)
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_its_greedy_tokens_are_the_cpu_platforms(installed: Path, smollm2_path: Path) -> None:
    done = run_python(installed, "-W", "ignore", "-c", GENERATE, str(smollm2_path), json.dumps(PROMPTS[:3]))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["toy_eager"] == found["cpu"]
    assert found["providers"] == ["composed", "reference"]
