"""Choosing a platform: by name, or the best one found. The choice always has a reason to print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hotplug.core.errors import PlatformError, nearest
from hotplug.core.platform.base import DeviceInfo, Platform
from hotplug.core.platform.discovery import Candidate


@dataclass(frozen=True, slots=True)
class Selection:
    """The platform and device an engine runs on, and why."""

    platform: Platform
    device: DeviceInfo
    reason: str


def select(device: str, candidates: Sequence[Candidate]) -> Selection:
    """The platform for `--device`: a name, `name:index`, or "auto".

    Auto takes a platform with memory of its own before one that shares the host's; among those the one with
    the most memory on its first device; then by name. A broken plugin stops auto: falling back past it would hide
    why the accelerator is idle. Raises PlatformError.
    """
    if device == "auto":
        return _best(candidates)
    name, _, index = device.partition(":")
    by_name = {c.name: c for c in candidates}
    candidate = by_name.get(name)
    if candidate is None:
        raise PlatformError(f"no platform is called {name!r}", where="--device", hint=nearest(name, by_name))
    if candidate.platform is None or not candidate.devices:
        raise PlatformError(f"platform {name!r} cannot be used", where="--device", why=candidate.reason,
                            hint="`hotplug devices` lists what was found.")  # fmt: skip
    found = {str(d.index): d for d in candidate.devices}
    chosen = found.get(index) if index else candidate.devices[0]
    if chosen is None:
        raise PlatformError(f"platform {name!r} has no device {index!r}", where="--device",
                            hint=f"Found: {', '.join(f'{name}:{i}' for i in found)}.")  # fmt: skip
    return Selection(candidate.platform, chosen, "asked for")


def _best(candidates: Sequence[Candidate]) -> Selection:
    broken = [c for c in candidates if c.broken]
    if broken:
        raise PlatformError(
            "--device auto will not pass over a broken plugin",
            why=[f"{c.name} ({c.distribution or 'unknown distribution'}): {c.reason}" for c in broken],
            hint="Repair or uninstall it, or name a platform with --device.",
        )
    usable = [c for c in candidates if c.platform is not None and c.devices]
    if not usable:
        raise PlatformError("no platform found a device", why=[f"{c.name}: {c.reason}" for c in candidates])

    def order(c: Candidate) -> tuple[bool, int, str]:
        assert c.platform is not None
        device = c.devices[0]
        try:
            shared = c.platform.limits(device).shared_host_memory
            return (shared, -c.platform.memory(device).total, c.name)
        except Exception as e:
            raise PlatformError("the platform cannot describe its device", where=f"platform {c.name}",
                                why=f"{type(e).__name__}: {e}",
                                hint="Repair or uninstall it, or name a platform with --device.") from e  # fmt: skip

    ranked = sorted(usable, key=order)
    best = ranked[0]
    assert best.platform is not None
    others = ", ".join(c.name for c in ranked[1:])
    reason = f"best of {', '.join(c.name for c in ranked)}" if others else "the only platform with a device"
    if others:
        reason += " (own memory before the host's, then the most memory, then the name)"
    return Selection(best.platform, best.devices[0], reason)
