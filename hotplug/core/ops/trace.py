"""Tracing: how long each call of each bound op takes, by site and by the kernel that really ran.

The plan puts a traced callable at every site when an engine is built with `trace_ops`; otherwise nothing of this
exists in a step. Every call waits for the device before and after, so a traced engine is slower than an untraced
one: compare calls with each other, never with a benchmark.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from hotplug.core.ops.compare import describe
from hotplug.core.ops.registry import Fn, Op, SiteSpec
from hotplug.core.platform.base import DeviceInfo, Platform
from hotplug.core.platform.optional import HasRuntime

SCHEMA = 1


@dataclass(slots=True)
class _Calls:
    """What one kernel did at one site."""

    spec: SiteSpec
    provider: str
    microseconds: array[float] = field(default_factory=lambda: array("d"))
    inputs: Any = ()
    outputs: Any = None


class Tracer:
    """Collects calls. `synchronize` returns once the device has done what was launched."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._calls: list[_Calls] = []
        self._inner = 0.0
        """Seconds that calls within the current one took: the parts of a lowered op."""

    def observe(self, op: Op, spec: SiteSpec, provider: str, fn: Fn) -> Fn:
        """`fn`, timed. Implements `hotplug.core.ops.registry.Observe`."""
        calls = _Calls(spec, provider)
        self._calls.append(calls)

        def traced(*args: Any) -> Any:
            self._synchronize()
            outer, self._inner = self._inner, 0.0
            begin = time.perf_counter()
            result = fn(*args)
            self._synchronize()
            calls.microseconds.append((time.perf_counter() - begin - self._inner) * 1e6)
            calls.inputs, calls.outputs = describe(args), describe(result)
            self._inner = outer + time.perf_counter() - begin  # with our own bookkeeping, which is not the op's
            return result

        return traced

    def reset(self) -> None:
        """Forget what was traced so far: profile steps, before the first request."""
        for calls in self._calls:
            del calls.microseconds[:]

    def report(self, steps: int) -> dict[str, Any]:
        """What ran in `steps` steps, as plain data: by op and kernel (most time first), and by site.

        Times are microseconds of the op itself: a fused op that was lowered has its parts listed apart.
        """
        made = [c for c in self._calls if c.microseconds]
        total = sum(sum(c.microseconds) for c in made)
        groups: dict[tuple[str, str], list[_Calls]] = {}
        for calls in made:
            groups.setdefault((calls.spec.op, calls.provider), []).append(calls)
        ops = [{"op": op, "provider": provider, "sites": len(group), **_figures(group, steps),
                "share": round(sum(sum(c.microseconds) for c in group) / total, 4)}
               for (op, provider), group in groups.items()]  # fmt: skip
        return {
            "schema": SCHEMA,
            "steps": steps,
            "total_us": round(total, 1),
            "ops": sorted(ops, key=lambda entry: -entry["total_us"]),
            "sites": [{"site": c.spec.site, "op": c.spec.op, "provider": c.provider, **_figures([c], steps),
                       "last_inputs": c.inputs, "last_outputs": c.outputs} for c in made],
        }  # fmt: skip


def _figures(group: Iterable[_Calls], steps: int) -> dict[str, Any]:
    times = [t for calls in group for t in calls.microseconds]
    total = sum(times)
    return {
        "calls": len(times),
        "total_us": round(total, 1),
        "median_us": round(median(times), 1),
        "us_per_step": round(total / max(steps, 1), 1),
    }


def synchronizer(platform: Platform, device: DeviceInfo, torch_device: torch.device) -> Callable[[], None]:
    """A function that waits for the device: by the platform's events, else by a copy to the host."""
    if isinstance(platform, HasRuntime):
        runtime = platform

        def wait() -> None:
            event = runtime.event()
            event.record()
            event.synchronize()

        return wait
    if torch_device.type in ("cpu", "meta"):  # calls return when they are done
        return lambda: None
    probe = torch.zeros(1, device=torch_device)

    def copy() -> None:
        probe.to("cpu")

    return copy
