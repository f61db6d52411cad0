"""The platform's package: what it imports, and how its probe behaves in a process of its own."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from hotplug.core.platform.base import Limits, MemoryInfo
from hotplug.plugins.conformance.report import Report, Skipped
from hotplug.plugins.conformance.target import Target

MOST_SYMBOLS = 30
ALLOWED = "hotplug.vendor"
PROBE_BAR = 1.0
"""Seconds that a probe may take, import included."""
_PROBE = """
import importlib, json, os, sys, time
begin = time.perf_counter()
module, name = sys.argv[1:]
platform = importlib.import_module(module)
for part in name.split("."):
    platform = getattr(platform, part)
platform = platform()
devices = [[d.index, d.name, d.arch] for d in platform.probe()]
print(json.dumps({"devices": devices, "heavy": [m for m in ("torch", "numpy") if m in sys.modules],
                  "seconds": time.perf_counter() - begin}))
"""


def imports(target: Target, report: Report) -> None:
    """The package imports nothing of hotplug but `hotplug.vendor`, and few names of that."""
    start = type(target.platform).__module__
    symbols: set[str] = set()
    seen: set[str] = set()
    todo = [start]
    while todo:
        module = todo.pop()
        if module in seen or (file := _source(module)) is None:
            continue
        seen.add(module)
        for line, imported, names in _imports(file, module):
            if _is_own(imported, start):
                todo += [imported, *(f"{imported}.{name}" for name in names)]
            elif imported == ALLOWED:
                symbols |= set(names)
            elif imported.split(".")[0] == "hotplug":
                report.fail(f"{file.name}:{line} imports {imported}: a platform imports {ALLOWED} and nothing else "
                            "of hotplug")  # fmt: skip
    if len(symbols) > MOST_SYMBOLS:
        report.fail(f"the package imports {len(symbols)} names of {ALLOWED}, {MOST_SYMBOLS} are enough")
    report.cases = len(seen)
    report.data |= {"modules": sorted(seen), "symbols": sorted(symbols)}


def _is_own(module: str, start: str) -> bool:
    """Whether a module belongs to the platform's package."""
    depth = 3 if start.startswith("hotplug.") else 1  # one that lies in the tree is a package of hotplug's
    return module.split(".")[:depth] == start.split(".")[:depth]


def _source(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def _imports(file: Path, module: str) -> list[tuple[int, str, list[str]]]:
    """(line, module, names) of every import in a file; `import a.b` has no names."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(file.read_text(), filename=str(file))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            found.append((node.lineno, base, [alias.name for alias in node.names]))
    return found


def probe(target: Target, report: Report) -> None:
    """Probing is quick, imports nothing heavy, and says the same in a spawned process; facts are sane."""
    answer = _spawned(target)
    here = [[d.index, d.name, d.arch] for d in target.platform.probe()]
    if answer["devices"] != here:
        report.fail(f"a spawned process finds other devices: {answer['devices']} instead of {here}")
    if answer["heavy"]:
        report.fail(f"probing imports {' and '.join(answer['heavy'])}: every command that lists devices would wait "
                    "for it, and a context may be made before a fork")  # fmt: skip
    if answer["seconds"] > PROBE_BAR:
        report.fail(f"probing takes {answer['seconds']:.1f} s, more than {PROBE_BAR} s")
    _facts(target, report)
    report.data["seconds"] = round(answer["seconds"], 3)
    report.cases = 3
    if not target.options.absent:
        report.note("absence was not tried: give --absent NAME=VALUE, variables that hide the device")
        return
    hidden = dict(pair.split("=", 1) for pair in target.options.absent)
    if devices := _spawned(target, hidden)["devices"]:
        report.fail(f"with {' '.join(target.options.absent)} the probe still answers {devices} instead of []")


def _facts(target: Target, report: Report) -> None:
    first, second = (target.platform.limits(target.device) for _ in range(2))
    if not isinstance(first, Limits):
        report.fail(f"limits answers {type(first).__name__}, not Limits")
    elif first != second:
        report.fail("limits changes from one call to the next")
    memory = target.platform.memory(target.device)
    if not isinstance(memory, MemoryInfo) or not 0 <= memory.free <= memory.total or memory.total <= 0:
        report.fail(f"memory answers {memory!r}: free and total bytes are needed, free no more than total")


def _spawned(target: Target, hidden: dict[str, str] | None = None) -> dict[str, object]:
    if target.make is None or "<locals>" in target.make.__qualname__:
        raise Skipped("the platform's class cannot be imported by name in another process")
    path = os.pathsep.join(p for p in sys.path if p)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, target.make.__module__, target.make.__qualname__],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": path, **(hidden or {})},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"probing in another process failed after {time.perf_counter() - begin:.1f} s: "
                           f"{done.stderr.strip().splitlines()[-1:]}")  # fmt: skip
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer
