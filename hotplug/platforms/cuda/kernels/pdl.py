"""Programmatic dependent launch (CUDA Programming Guide, "Programmatic Dependent Launch and Synchronization").

A kernel launched with `launch_pdl=True` may begin while the one before it still runs: it reads what no kernel of the
step writes (weights), then waits, and only then touches anything else. Every such kernel waits in every program, so
waiting for one means that all before it have finished too.
"""

from __future__ import annotations

import os
from functools import cache

import torch
import triton
import triton.language as tl

from hotplug.platforms.cuda.target import target


@triton.jit
def wait(PDL: tl.constexpr):
    """Return once the kernel before has finished and its writes are visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """Let the kernel after this one begin; what it reads of ours it waits for all the same."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@cache
def _overlaps(device: torch.device) -> bool:
    return (
        device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
        and os.environ.get("TRITON_INTERPRET") != "1"
    )  # fmt: skip


def options(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that takes `PDL`: on where the device overlaps kernels (Hopper and later)."""
    return {"PDL": True, "launch_pdl": True} if _overlaps(target(device)) else {"PDL": False}
