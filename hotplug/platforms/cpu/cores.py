"""The cores of a process that is one of several on this machine: a part of the physical ones, with their siblings."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from hotplug.platforms.cpu.native import library

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_alone: list[int] = []
"""Threads of PyTorch and of the native library before the first `take`: a user may have set fewer than there are."""


def take(rank: int, ranks: int) -> None:
    """Have PyTorch and the native library run on part number `rank` of `ranks` of the cores that the process may use.

    Rank 0 keeps to its part by the number of threads alone: it may be a user's program, which starts others.
    """
    native = library.load() if library.refusal() is None else None
    if not _alone:
        _alone[:] = torch.get_num_threads(), native.threads if native is not None else 0
    cores = physical_cores()
    count = max(1, len(cores) // ranks) if ranks > 1 else max(_alone)
    if rank and hasattr(os, "sched_setaffinity"):
        part = cores[rank * count : (rank + 1) * count] or [cores[rank % len(cores)]]
        os.sched_setaffinity(0, [cpu for core in part for cpu in core])
    torch.set_num_threads(min(count, _alone[0]))
    if native is not None:
        native.set_threads(min(count, _alone[1]))


def physical_cores() -> list[list[int]]:
    """The processors that this process may run on, by physical core; each its own where the system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return [[cpu] for cpu in range(os.cpu_count() or 1)]
    found: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        try:
            siblings = Path(_SIBLINGS.format(cpu)).read_text()
        except OSError:
            siblings = str(cpu)
        found.setdefault(siblings, []).append(cpu)
    return list(found.values())
