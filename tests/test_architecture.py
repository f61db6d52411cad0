"""The layout's rules, enforced: imports run one way, the core names no device, platforms see `hotplug.vendor` only."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import hotplug

ROOT = Path(hotplug.__file__).parent

RANKS = {
    "hotplug.core.errors": 0,
    "hotplug.core.checks": 0,
    "hotplug.core.logprobs": 0,
    "hotplug.core.request": 0,
    "hotplug.core.config": 0,
    "hotplug.core.platform": 1,
    "hotplug.core.extension": 2,
    "hotplug.core.ops": 2,
    "hotplug.core.kv": 2,
    "hotplug.core.weights": 2,
    "hotplug.core.text": 2,
    "hotplug.core.interface_1": 3,
    "hotplug.core.quant": 3,
    "hotplug.core.sample": 3,
    "hotplug.core.layers": 4,
    "hotplug.core.models": 5,
    "hotplug.core.transfer": 5,
    "hotplug.core.scheduler": 6,
    "hotplug.core.runner": 6,
    "hotplug.core.parallel": 7,
    "hotplug.core.startup": 8,
    "hotplug.core.engine": 9,
    "hotplug.core.client": 10,
    "hotplug.core.tools": 10,
    "hotplug.plugins": 11,
    "hotplug.server": 11,
    "hotplug.cli": 12,
    "hotplug.vendor": 3,  # shows plugins what platform, ops and errors offer
    "hotplug.platforms": 4,  # held to `hotplug.vendor` by a rule of its own
}
"""A package may import from lower ranks, and within itself."""

SIDEWAYS = {
    ("hotplug.core.config", "hotplug.core.errors"),
    ("hotplug.core.checks", "hotplug.core.errors"),
    ("hotplug.core.request", "hotplug.core.checks"),
    ("hotplug.core.request", "hotplug.core.logprobs"),
    ("hotplug.core.runner", "hotplug.core.scheduler.plan"),  # the contract of the two
    ("hotplug.core.text", "hotplug.core.weights"),  # a GGUF file holds its tokenizer too
}
"""Imports within one rank that are meant."""

TYPED_ONLY = {"hotplug.core.platform", "hotplug.core.extension"}
"""Packages whose signatures name what is built on them."""

DEVICES = re.compile(r"(?<![a-z])(cuda|rocm|hip|tpu|xla|xpu|triton|openvino)s?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Import:
    """One import: of the module `target`, by `module`."""

    module: str
    target: str
    line: int
    lazy: bool
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def sources() -> dict[str, str]:
    """Every module of the package and its source."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


MODULES = sources()


def imports(module: str, source: str, *, is_package: bool = False) -> Iterator[Import]:
    """The hotplug imports of a module, at any depth."""
    base = module if is_package else module.rpartition(".")[0]

    def visit(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inner_lazy = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                body, rest = ast.Module(child.body, []), ast.Module(child.orelse, [])
                yield from visit(body, lazy, True)
                yield from visit(rest, lazy, typing_only)
                continue
            for target in targets(child):
                if target.split(".")[0] == "hotplug":
                    yield Import(module, target, child.lineno, lazy, typing_only)
            yield from visit(child, inner_lazy, typing_only)

    def targets(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if not isinstance(node, ast.ImportFrom):
            return []
        origin = node.module or ""
        if node.level:
            parents = base.split(".")
            origin = ".".join([*parents[: len(parents) - node.level + 1], *([origin] if origin else [])])
        named = [f"{origin}.{alias.name}" for alias in node.names]
        return [n if n in MODULES or origin == "hotplug" else origin for n in named]

    yield from visit(ast.parse(source), False, False)


def all_imports(modules: Mapping[str, str]) -> list[Import]:
    packages = {name.rpartition(".")[0] for name in MODULES}
    return [i for name, source in modules.items() for i in imports(name, source, is_package=name in packages)]


def package(module: str) -> str:
    """The ranked package that a module belongs to; empty for the bare `hotplug`."""
    return max((p for p in RANKS if module == p or module.startswith(p + ".")), key=len, default="")


def wrong_arrows(modules: Mapping[str, str]) -> list[str]:
    wrong = []
    for i in all_imports(modules):
        source, target = package(i.module), package(i.target)
        if not source:
            if not i.typing_only:  # the Python API loads on first use
                wrong.append(f"{i}, eagerly")
        elif not target:
            if i.target not in ("hotplug", "hotplug.__version__"):
                wrong.append(f"{i}, which has no rank")
        elif source != target and RANKS[source] <= RANKS[target]:
            sideways = any(source == s and (i.target + ".").startswith(t + ".") for s, t in SIDEWAYS)
            if not sideways and not (source in TYPED_ONLY and i.typing_only):
                wrong.append(str(i))
    return wrong


def cycles(modules: Mapping[str, str]) -> list[str]:
    """Import cycles that loading the modules would run into."""
    graph: dict[str, list[str]] = {name: [] for name in modules}
    for i in all_imports(modules):
        if not i.lazy and not i.typing_only and i.target in graph and i.target != i.module:
            graph[i.module].append(i.target)
    found: list[str] = []
    state: dict[str, str] = {}

    def walk(name: str, path: list[str]) -> None:
        if state.get(name) == "open":
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in state:
            state[name] = "open"
            for target in graph[name]:
                walk(target, [*path, name])
            state[name] = "done"

    for name in graph:
        walk(name, [])
    return found


def device_names(module: str, source: str) -> list[str]:
    """Device names in names and strings; comments may explain with them."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            continue
        text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]{2})", "_", token.string)
        found += [f"{module}:{token.start[0]} names {name}" for name in DEVICES.findall(text)]
    return found


def outside_vendor(modules: Mapping[str, str]) -> list[str]:
    """What platforms import of hotplug beyond `hotplug.vendor` and their own package."""
    wrong = []
    for i in all_imports(modules):
        if i.module.startswith("hotplug.platforms."):
            own = ".".join(i.module.split(".")[:3])
            if i.target != "hotplug.vendor" and not (i.target + ".").startswith(own + "."):
                wrong.append(str(i))
    return wrong


def uses_of_platforms(modules: Mapping[str, str]) -> list[str]:
    """Modules outside `hotplug.platforms` that reach into it, by import or by a module's name in a string."""
    outside = {name: source for name, source in modules.items() if package(name) != "hotplug.platforms"}
    wrong = [str(i) for i in all_imports(outside) if package(i.target) == "hotplug.platforms"]
    for name, source in outside.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and str(node.value).startswith("hotplug.platforms."):
                wrong.append(f"{name}:{node.lineno} names {node.value}")
    return wrong


# --- the rules ------------------------------------------------------------------------------------


def test_every_module_has_a_rank() -> None:
    assert {name for name in MODULES if not package(name)} == {"hotplug", "hotplug.core"}


def test_imports_run_one_way() -> None:
    assert wrong_arrows(MODULES) == []


def test_modules_import_each_other_without_cycles() -> None:
    assert cycles(MODULES) == []


def test_core_and_server_name_no_device() -> None:
    shared = {n: source for n, source in MODULES.items() if n.startswith(("hotplug.core", "hotplug.server"))}
    assert len(shared) > 50
    assert [name for module, source in shared.items() for name in device_names(module, source)] == []


def test_platforms_import_the_vendor_interface_only() -> None:
    assert outside_vendor(MODULES) == []


def test_nothing_imports_a_platform() -> None:
    assert uses_of_platforms(MODULES) == []


def test_platforms_are_probed_without_torch() -> None:
    """Importing the interface and probing every in-tree platform must not pay for torch."""
    program = """
import sys
import hotplug.vendor
import hotplug.core.platform.features, hotplug.core.platform.select
from hotplug.core.platform.discovery import discover
found = {c.name: c for c in discover()}
assert found["cpu"].devices, found
assert not any(c.broken for c in found.values()), found
with_torch = ("AttentionInputs", "finite_values", "gather_kv")
for name in hotplug.vendor.__all__:
    assert name in with_torch or getattr(hotplug.vendor, name) is not None
heavy = {"torch", "transformers", "numpy"} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_vendor_interface_offers_every_name_it_lists() -> None:
    import hotplug.vendor as vendor

    assert {name for name in vendor.__all__ if getattr(vendor, name, None) is None} == set()
    assert len(vendor.__all__) <= 30
    assert sorted(vendor.__all__) == sorted(vendor._MODULE_OF)
    with pytest.raises(AttributeError, match="no attribute 'torch'"):
        vendor.torch  # noqa: B018


# --- the checkers can fail ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hotplug.core.ops.bad", "from hotplug.core.engine.core import EngineCore"),
        ("hotplug.core.ops.bad", "def f():\n    import hotplug.core.layers.dense"),
        ("hotplug.core.ops.bad", "from ..engine import core"),
        ("hotplug.core.ops.bad", "from hotplug.core.kv import pool"),
        ("hotplug.core.layers.bad", "if TYPE_CHECKING:\n    from hotplug.core.models.decoder import Decoder"),
        ("hotplug.core.platform.bad", "from hotplug.core.ops.registry import OpRegistry"),
        ("hotplug.core.runner.bad", "from hotplug.core.scheduler.scheduler import Scheduler"),
        ("hotplug.core.errors", "from hotplug.core.config import EngineConfig"),
        ("hotplug.core.engine.bad", "from hotplug import LLM"),
        ("hotplug.server.bad", "import hotplug.cli"),
        ("hotplug", "from hotplug.core.request import SamplingParams"),
    ],
)
def test_an_import_against_the_arrows_is_found(module: str, source: str) -> None:
    assert len(wrong_arrows({module: source})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hotplug.core.platform.good", "if TYPE_CHECKING:\n    from hotplug.core.ops.registry import OpRegistry"),
        ("hotplug.core.runner.good", "from hotplug.core.scheduler.plan import StepPlan"),
        ("hotplug.core.engine.good", "import torch\nfrom hotplug.core.runner import runner"),
        ("hotplug.server.good", "import hotplug\nfrom hotplug import __version__"),
    ],
)
def test_an_import_along_the_arrows_passes(module: str, source: str) -> None:
    assert wrong_arrows({module: source}) == []


def test_a_cycle_is_found() -> None:
    planted = {
        "hotplug.core.kv.pool": "from hotplug.core.kv.groups import KVGroups",
        "hotplug.core.kv.groups": "from hotplug.core.kv import manager",
        "hotplug.core.kv.manager": "import hotplug.core.kv.pool",
    }
    assert cycles(planted) == [
        "hotplug.core.kv.pool -> hotplug.core.kv.groups -> hotplug.core.kv.manager -> hotplug.core.kv.pool"
    ]
    planted["hotplug.core.kv.manager"] = "def f():\n    import hotplug.core.kv.pool"
    assert cycles(planted) == []


@pytest.mark.parametrize(
    "source",
    [
        'x = "cuda:0"',
        "is_cuda = 1",
        "class CudaGraph: ...",
        '"""For TPUs: xla."""',
        "XLATensor = hipMalloc",
        'f"{1}-XPU"',
    ],
)
def test_a_device_name_is_found(source: str) -> None:
    assert device_names("m", source + "\n")


def test_a_comment_or_a_longer_word_is_no_device_name() -> None:
    assert device_names("m", "outputs = relationship = chips  # unlike cuda\n") == []


@pytest.mark.parametrize(
    "source", ["import hotplug.core.errors", "from hotplug.platforms.cpu import CpuPlatform", "from hotplug import LLM"]
)
def test_a_platform_that_reaches_past_the_vendor_interface_is_found(source: str) -> None:
    assert len(outside_vendor({"hotplug.platforms.acme.kernels": source})) == 1


def test_a_platform_may_import_its_own_package_and_others() -> None:
    source = "import torch, hotplug.vendor\nfrom hotplug.platforms.acme import kernels\nfrom hotplug.vendor import Impl"
    assert outside_vendor({"hotplug.platforms.acme": source}) == []


@pytest.mark.parametrize("source", ["import hotplug.platforms.cpu", 'x = "hotplug.platforms.cpu"'])
def test_a_use_of_a_platform_is_found(source: str) -> None:
    assert len(uses_of_platforms({"hotplug.core.engine.bad": source})) == 1
