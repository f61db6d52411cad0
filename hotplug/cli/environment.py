"""What `hotplug doctor` looks at, gathered once into plain data so that the checks are functions of it."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hotplug.core.errors import PlatformError

_NODES = {
    "cuda": ("/dev", "nvidia*"),
    "rocm": ("/dev", "kfd"),
    "tpu": ("/dev", "accel*"),
    "xpu": ("/dev/dri", "renderD*"),
}
"""Where the driver of each extra's hardware shows devices: folder and pattern."""


@dataclass(frozen=True, slots=True)
class Torch:
    """The installed torch: its version and what it was built for, or why it does not import."""

    version: str = ""
    cuda: str = ""
    hip: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Plugin:
    """A platform plugin as discovery saw it, with what it says of the machine."""

    name: str
    distribution: str
    num_devices: int
    reason: str = ""
    broken: bool = False
    findings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A machine and an installation. Sizes in bytes."""

    python: tuple[int, int, int]
    torch: Torch
    transformers: str | None
    """Version, None if it is not installed."""
    extras: dict[str, tuple[str, ...] | None]
    """Each extra that hotplug declares, with the requirements that are missing; None where it asks for nothing."""
    nodes: frozenset[str]
    """Extras whose device nodes exist on this machine."""
    plugins: tuple[Plugin, ...]
    plugin_conflict: str
    """Why the platform plugins could not be listed, or an empty string."""
    cache: Path
    cache_error: str
    """Why the cache folder cannot be written, or an empty string."""
    disk_free: int
    memory_free: int
    open_files: int | None
    """Soft limit of open files; None where the system has none."""


def snapshot() -> Environment:
    """This machine, now."""
    import psutil

    from hotplug.core.weights.source import cache_folder

    cache = cache_folder()
    plugins, conflict = _plugins()
    return Environment(
        python=sys.version_info[:3],
        torch=_torch(),
        transformers=_version("transformers"),
        extras=missing_by_extra(),
        nodes=frozenset(name for name, (folder, pattern) in _NODES.items() if any(Path(folder).glob(pattern))),
        plugins=plugins,
        plugin_conflict=conflict,
        cache=cache,
        cache_error=_write_error(cache),
        disk_free=shutil.disk_usage(_existing(cache)).free,
        memory_free=psutil.virtual_memory().available,
        open_files=_open_files(),
    )


def _torch() -> Torch:
    try:
        import torch
    except Exception as e:  # a broken build fails to import in any way
        return Torch(version=_version("torch") or "", error=f"{type(e).__name__}: {e}")
    return Torch(torch.__version__, torch.version.cuda or "", torch.version.hip or "")


def missing_by_extra() -> dict[str, tuple[str, ...] | None]:
    """Each extra that the installed hotplug declares, with those of its requirements that are not met.

    None stands for an extra that has no requirement, on this machine or at all.
    """
    from packaging.requirements import Requirement

    distribution = metadata.distribution("hotplug")
    extras: dict[str, list[str]] = {name: [] for name in distribution.metadata.get_all("Provides-Extra") or ()}
    asks: set[str] = set()
    for line in distribution.requires or ():
        requirement = Requirement(line)
        for extra, missing in extras.items():
            marker = requirement.marker
            if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
                continue  # of hotplug itself, or of another extra
            asks.add(extra)
            version = _version(requirement.name)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                missing.append(f"{requirement.name}{requirement.specifier}")
    return {name: tuple(missing) if name in asks else None for name, missing in extras.items()}


def _plugins() -> tuple[tuple[Plugin, ...], str]:
    from hotplug.core.platform.discovery import discover
    from hotplug.core.platform.optional import HasDiagnosis

    try:
        candidates = discover()
    except PlatformError as e:
        return (), str(e)
    found = []
    for c in candidates:
        # where nothing was found, the platform's own diagnosis is already the reason
        findings = tuple(c.platform.diagnose()) if c.devices and isinstance(c.platform, HasDiagnosis) else ()
        found.append(Plugin(c.name, c.distribution, len(c.devices), c.reason, c.broken, findings))
    return tuple(found), ""


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.parents) if p.exists())


def _write_error(cache: Path) -> str:
    """Why a file cannot be made in the cache folder; the folder is not created by looking."""
    folder = _existing(cache)
    if not folder.is_dir():
        return f"{folder} is not a folder"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"no permission to write in {folder}"


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft
