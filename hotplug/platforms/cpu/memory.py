"""The host's memory as this process may use it: the machine's, or what its control groups leave of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hotplug.vendor import MemoryInfo

_ROOT, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class _Files(NamedTuple):
    """Where a version of control groups says what."""

    limit: str
    used: str
    prefix: str
    """Of the entries of `memory.stat` that count children too."""


_V2 = _Files("memory.max", "memory.current", "")
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def host_memory(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> MemoryInfo:
    """Free and total bytes: the least that the machine and each control group above this process allow.

    A group counts the files that it has read as used; they are given back when memory is short, so they are free here.
    """
    import psutil

    machine = psutil.virtual_memory()
    free, total = int(machine.available), int(machine.total)
    for limit, used in _groups(root, membership):
        free, total = min(free, limit - used), min(total, limit)
    return MemoryInfo(free=max(free, 0), total=total)


def _groups(root: Path, membership: Path) -> Iterator[tuple[int, int]]:
    """Limit and bytes in use that cannot be given back, of every group with a limit."""
    for files, top, path in _hierarchies(root, membership):
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder == top or top in folder.parents:
                found = _read(folder, files)
                if found is not None:
                    yield found


def _hierarchies(root: Path, membership: Path) -> Iterator[tuple[_Files, Path, str]]:
    """Files, top folder and this process's path in it, of the version 2 hierarchy and of version 1's for memory."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield _V2, root, path
        elif "memory" in controllers.split(","):
            yield _V1, root / "memory", path


def _read(folder: Path, files: _Files) -> tuple[int, int] | None:
    """Limit and use of one group; None without a limit, or where it is not to be seen from here."""
    try:
        limit, used = ((folder / name).read_text().strip() for name in (files.limit, files.used))
        entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if not limit.isdigit():
        return None
    cached = sum(int(entries.get(f"{files.prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return int(limit), max(int(used) - cached, 0)
