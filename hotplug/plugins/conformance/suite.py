"""The suite: its checks in order, and a run of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hotplug.core.errors import ConfigError, nearest
from hotplug.plugins.conformance.check_comm import collectives
from hotplug.plugins.conformance.check_end_to_end import end_to_end
from hotplug.plugins.conformance.check_engine import executables, features
from hotplug.plugins.conformance.check_kv import kv
from hotplug.plugins.conformance.check_leaks import leaks
from hotplug.plugins.conformance.check_ops import honesty, ops
from hotplug.plugins.conformance.check_package import imports, probe
from hotplug.plugins.conformance.report import Check, Result, run_check
from hotplug.plugins.conformance.target import Options, Target, find_target

CHECKS = (
    Check("imports", "imports hotplug.vendor and nothing else", imports),
    Check("probe", "probe, limits and memory", probe),
    Check("ops", "kernels equal their references", ops),
    Check("honesty", "check keeps its word", honesty),
    Check("kv", "KV blocks: written, read, copied", kv),
    Check("features", "declared works, undeclared is refused", features),
    Check("end_to_end", "greedy tokens are the references'", end_to_end),
    Check("executables", "captured and compiled steps", executables),
    Check("collectives", "collectives against gloo, 2 ranks", collectives),
    Check("leaks", "memory, threads and files", leaks),
)


def chosen(only: Sequence[str]) -> list[Check]:
    """The checks of these names, all without any. Raises ConfigError."""
    known = {check.name: check for check in CHECKS}
    for name in only:
        if name not in known:
            raise ConfigError(f"there is no check {name!r}", where="--only", hint=nearest(name, known))
    return [known[name] for name in only] or list(CHECKS)


def run(
    name: str, options: Options, only: Sequence[str] = (), *, on_result: Callable[[Result], None] = lambda _: None
) -> tuple[Target, list[Result]]:
    """Examine the installed platform `name`. Raises ConfigError and PlatformError; a fault is a failed result."""
    checks = chosen(only)
    with tempfile.TemporaryDirectory(prefix="conform-", ignore_cleanup_errors=True) as folder:
        target = find_target(name, options, Path(folder))
        results = []
        for check in checks:
            results.append(run_check(check, target))
            on_result(results[-1])
    return target, results
