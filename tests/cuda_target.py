"""What the CUDA kernels are tested on: the GPU where there is one, else the host's tensors and Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fake_platforms import FakePlatform, limits

from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.registry import Impl, OpRegistry
from hotplug.core.platform.base import DeviceInfo, ExecMode, Limits
from hotplug.platforms.cuda import CudaPlatform
from hotplug.platforms.cuda.kernels import KERNELS
from hotplug.plugins.conformance.target import Options, Target

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
HOPPER = DeviceInfo(index=0, name="interpreted", arch="sm_90", cores=132)


@dataclass
class Interpreted(FakePlatform):
    """The CUDA platform's kernels and facts over tensors of the host."""

    name: str = "interpreted"
    devices: Sequence[DeviceInfo] = (HOPPER,)
    kernels: Sequence[Impl] = KERNELS
    facts: Limits = field(default_factory=lambda: facts("float32"))


def facts(*dtypes: str, **changes: Any) -> Limits:
    """What the CUDA platform says of itself, for some of its dtypes; steps run op by op."""
    own = CudaPlatform().limits(HOPPER)
    return limits(dtypes=dtypes, block_sizes=own.block_sizes, kv_layouts=own.kv_layouts, index_dtype=own.index_dtype,
                  exec_modes=(ExecMode.EAGER,), asynchronous=own.asynchronous, **changes)  # fmt: skip


def target(folder: Path, *dtypes: str, kernels: Sequence[Impl] = KERNELS) -> Target:
    """What the conformance kit examines: the ops of these `kernels`, for these dtypes."""
    platform: Any = CudaPlatform() if HAS_GPU else Interpreted()
    found = Target(platform, platform.probe()[0], None, Options(quick=True), folder)
    builtin = builtin_registry()
    found.limits = facts(*dtypes)
    found.registry = OpRegistry(builtin.op(name) for name in {kernel.op: None for kernel in kernels})
    for kernel in kernels:
        found.registry.add(kernel)
    return found
