"""What checks find, and the certificate made of it."""

from __future__ import annotations

import datetime
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

import hotplug
from hotplug.core.platform.base import API_VERSION
from hotplug.core.platform.discovery import declared_version
from hotplug.plugins.conformance.target import Target

SCHEMA = 1
MOST_FAILURES = 12
"""Shown of one check; the number of the others is said."""


class Skipped(Exception):  # noqa: N818  (a verdict, not an error)
    """The check does not apply, for this reason."""


@dataclass
class Report:
    """What one check says while it runs."""

    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    cases: int = 0

    def fail(self, message: str) -> None:
        """A fault, in words that name it."""
        if message not in self.failures:
            self.failures.append(message)

    def note(self, message: str) -> None:
        """What a reader of the certificate should know."""
        if message not in self.notes:
            self.notes.append(message)


CheckFn = Callable[[Target, Report], None]


@dataclass(frozen=True)
class Check:
    """One named part of the suite."""

    name: str
    title: str
    run: CheckFn


@dataclass
class Result:
    """How a check ended."""

    name: str
    title: str
    outcome: Literal["passed", "failed", "skipped"]
    seconds: float
    cases: int
    failures: list[str]
    notes: list[str]
    data: dict[str, Any]


def run_check(check: Check, target: Target) -> Result:
    """Run one check; whatever it raises is a failure of it."""
    report, begin = Report(), time.perf_counter()
    outcome: Literal["passed", "failed", "skipped"] = "passed"
    try:
        check.run(target, report)
    except Skipped as e:
        outcome = "skipped"
        report.note(str(e))
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        report.fail(f"raised {type(e).__name__}: {e} ({where.filename}:{where.lineno})")
    if report.failures:
        outcome = "failed"
    more = len(report.failures) - MOST_FAILURES
    failures = report.failures[:MOST_FAILURES] + ([f"and {more} more"] if more > 0 else [])
    seconds = round(time.perf_counter() - begin, 3)
    return Result(check.name, check.title, outcome, seconds, report.cases, failures, report.notes, report.data)


def certificate(target: Target, results: list[Result]) -> dict[str, Any]:
    """The JSON document of a run (docs/conformance.md)."""
    limits, device = target.limits, target.device
    registry = target.registry
    kernels = {op: [impl.provider for impl in registry.impls(op)] for op in registry.names}
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hotplug": hotplug.__version__,
        "api_version": declared_version(target.platform),
        "core_api_version": API_VERSION,
        "torch": str(torch.__version__),
        "platform": target.platform.name,
        "device": {"name": device.name, "arch": device.arch, "index": device.index},
        "quick": target.options.quick,
        "passed": all(r.outcome != "failed" for r in results),
        "ops_covered": {op: providers for op, providers in kernels.items() if providers},
        "reference_ops": [op for op, providers in kernels.items() if not providers],
        "features": {
            "dtypes": list(limits.dtypes),
            "kv_dtypes": list(limits.kv_dtypes or limits.dtypes),
            "quantization": list(limits.quantization),
            "block_sizes": list(limits.block_sizes),
            "kv_layouts": [str(layout) for layout in limits.kv_layouts],
            "exec_modes": [str(mode) for mode in limits.exec_modes],
            "features": sorted(str(feature) for feature in limits.features),
        },
        "checks": [
            {"name": r.name, "title": r.title, "outcome": r.outcome, "seconds": r.seconds, "cases": r.cases,
             "failures": r.failures, "notes": r.notes, "data": r.data}
            for r in results
        ],
    }  # fmt: skip
