"""The cores of a process that is one of several on this machine: a part of the physical ones, with their siblings."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from hotplug.platforms.cpu.native import library

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def take(rank: int, ranks: int) -> None:
    """Have PyTorch and the native library run on part number `rank` of `ranks` of the cores that the process may use.

    The first part is kept by the number of threads alone: rank 0 may be a user's program, which starts others.
    """
    cores = physical_cores()
    count = max(1, len(cores) // ranks)
    if rank:
        part = cores[rank * count : (rank + 1) * count] or cores[rank % len(cores) :][:1]
        os.sched_setaffinity(0, [cpu for core in part for cpu in core])
    torch.set_num_threads(count)
    if library.refusal() is None:
        library.load().set_threads(count)


def physical_cores() -> list[list[int]]:
    """The processors that this process may run on, by physical core; each its own where the system does not say."""
    found: dict[str, list[int]] = {}
    if not hasattr(os, "sched_getaffinity"):
        return [[cpu] for cpu in range(os.cpu_count() or 1)]
    for cpu in sorted(os.sched_getaffinity(0)):
        try:
            siblings = Path(_SIBLINGS.format(cpu)).read_text()
        except OSError:
            siblings = str(cpu)
        found.setdefault(siblings, []).append(cpu)
    return list(found.values())
