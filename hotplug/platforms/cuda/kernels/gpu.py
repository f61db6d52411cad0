"""Which generation of GPU a kernel is launched on: what its configuration may rest on."""

from __future__ import annotations

from functools import cache

import torch

from hotplug.platforms.cuda.target import target

HOPPER = (9, 0)
"""From here on tiles are copied by descriptor, and products leave registers free."""


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability. (0, 0) on AMD; that of Hopper on the host, where kernels are interpreted."""
    return _capability(target(device))


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    if device.type == "cpu":
        return HOPPER
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU; those of an H100 where kernels are interpreted or compiled without one."""
    return _multiprocessors(target(device))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
