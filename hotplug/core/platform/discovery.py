"""Plugins found by entry point. A plugin that fails to import is reported with its reason, never skipped.

Group `hotplug.platforms` holds platforms, group `hotplug.plugins` every other extension. An entry point
names a class or function of no arguments; calling it gives the plugin.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from hotplug.core.errors import PlatformError
from hotplug.core.platform.base import API_VERSION, DeviceInfo, Platform
from hotplug.core.platform.optional import HasDiagnosis

PLATFORM_GROUP = "hotplug.platforms"


@dataclass(frozen=True, slots=True)
class Loaded:
    """One entry point after loading: either `plugin` or the reason it has none."""

    name: str
    target: str
    distribution: str
    plugin: Any = None
    error: str = ""


def load_group(group: str) -> list[Loaded]:
    """Every entry point of a group, loaded and called, in name order."""
    found = [_load(entry) for entry in entry_points(group=group)]
    return sorted(found, key=lambda loaded: (loaded.name, loaded.target))


def _load(entry: EntryPoint) -> Loaded:
    distribution = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""
    try:
        plugin = entry.load()()
    except (Exception, SystemExit) as e:  # a plugin may do anything while it loads; the others go on
        return Loaded(entry.name, entry.value, distribution, error=f"{type(e).__name__}: {e}")
    return Loaded(entry.name, entry.value, distribution, plugin=plugin)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A platform as discovery saw it: its devices, or why it has none."""

    name: str
    distribution: str
    platform: Platform | None
    devices: tuple[DeviceInfo, ...] = ()
    reason: str = ""
    """Why it cannot be used; empty if it can."""
    api_version: str = ""
    """The interface that it was written for, where that could be asked."""
    broken: bool = False
    """True where the plugin itself is at fault, false where the hardware is absent."""


def discover(loaded: Iterable[Loaded] | None = None) -> list[Candidate]:
    """Every platform plugin, probed. Raises PlatformError when two plugins claim one name."""
    candidates: dict[str, Candidate] = {}
    for item in load_group(PLATFORM_GROUP) if loaded is None else loaded:
        candidate = _probe(item)
        other = candidates.get(candidate.name)
        if other is not None:
            raise PlatformError(
                f"two plugins provide the platform {candidate.name!r}",
                why=[other.distribution or other.name, candidate.distribution or item.target],
                hint="Uninstall one of them.",
            )
        candidates[candidate.name] = candidate
    return list(candidates.values())


def _probe(item: Loaded) -> Candidate:
    version = ""

    def broken(reason: str) -> Candidate:
        return Candidate(item.name, item.distribution, None, reason=reason, api_version=version, broken=True)

    if item.error:
        return broken(f"the plugin failed to load ({item.target}): {item.error}")
    platform = item.plugin
    missing = [m for m in ("name", "torch_device", "probe", "limits", "memory", "register")
               if not hasattr(platform, m)]  # fmt: skip
    if missing:
        return broken(f"the plugin lacks required members: {', '.join(missing)}")
    version = declared_version(platform)
    reason = incompatible(version)
    if reason:
        return broken(reason)
    try:
        devices = tuple(platform.probe())
    except Exception as e:
        return broken(f"probe failed: {type(e).__name__}: {e}")
    try:
        reason = "" if devices else _absence(platform)
    except Exception as e:
        return broken(f"diagnose failed: {type(e).__name__}: {e}")
    return Candidate(platform.name, item.distribution, platform, devices, reason, version)


def _absence(platform: Platform) -> str:
    findings = platform.diagnose() if isinstance(platform, HasDiagnosis) else ()
    return "; ".join(findings) or "no device found"


def declared_version(platform: object) -> str:
    """The interface that a platform was written for: what its `api_version` says, "1.0" where it has none."""
    return str(getattr(platform, "api_version", "1.0"))


def incompatible(version: object) -> str:
    """Why a plugin written for interface `version` cannot be served, or an empty string."""
    core_major, core_minor = (int(part) for part in API_VERSION.split("."))
    try:
        major, minor = (int(part) for part in str(version).split("."))
    except ValueError:
        return f"api_version {version!r} is not of the form major.minor"
    if major > core_major or (major == core_major and minor > core_minor):
        return f"the plugin needs interface {version}, this hotplug has {API_VERSION}; upgrade hotplug"
    if major < core_major - 1:
        return f"the plugin was written for interface {version}, this hotplug serves {core_major - 1}.x and up"
    return ""
