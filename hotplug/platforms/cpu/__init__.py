"""The CPU platform: runs anywhere, with nothing but `pip install`."""

from __future__ import annotations

import functools
import os
import platform as host
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotplug.vendor import CompileLimits, DeviceInfo, ExecMode, Feature, KVLayout, Limits, MemoryInfo

if TYPE_CHECKING:
    import torch

    from hotplug.platforms.cpu.openvino.compiler import Compiler
    from hotplug.vendor import OpRegistry, RankGroup, SiteSpec, StepProgram, Verdict


class CpuPlatform:
    """The host's processor as a device."""

    name = "cpu"
    torch_device = "cpu"
    api_version = "2.0"

    def probe(self) -> Sequence[DeviceInfo]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        model, flags = _cpuinfo()
        isa = next((name for flag, name in _ISAS if flag in flags), host.machine())
        return [DeviceInfo(index=0, name=model, arch=isa, cores=cores, details=f"{cores} cores, {isa}")]

    def limits(self, device: DeviceInfo) -> Limits:
        from hotplug.platforms.cpu import openvino
        from hotplug.platforms.cpu.native.library import refusal

        # Without the library a step is made of PyTorch's calls alone, which recording does not make faster.
        recorded = refusal() is None
        # Below AVX-512 a bfloat16 matrix product is emulated and several times slower than float32.
        narrow_is_slow = device.arch not in ("amx", "avx512_bf16")
        modes = (ExecMode.CAPTURE, ExecMode.EAGER) if recorded else (ExecMode.EAGER,)
        not_compiled = openvino.refusal(device.arch)
        return Limits(
            dtypes=("float32", "bfloat16", "float16"),
            auto_dtype="float32" if narrow_is_slow else None,
            kv_dtypes=("float32", "bfloat16", "float16", "fp8_e4m3"),
            kv_kinds=("full", "window", "latent", "state"),
            quantization=("packed", "none", "*"),  # decoding goes by the bytes of the weights
            block_sizes=(16, 32, 64, 128, 1, 2, 4, 8),
            kv_layouts=(KVLayout.NHD, KVLayout.HND),
            exec_modes=modes if not_compiled else (*modes, ExecMode.COMPILE),
            capture_on_use=True,
            compiled=CompileLimits(
                dynamic=True,
                refusal=not_compiled,
                dtypes=("float32",),
                kv_dtypes=("float32", "float16"),
                quantization=("packed", "none"),
                block_sizes=(32,),
                kv_layouts=(KVLayout.HND,),
            ),
            shared_host_memory=True,
            accelerator=False,
            features=frozenset({Feature.FP8_KV, Feature.SPECULATIVE, Feature.TENSOR_PARALLEL}),
        )

    def memory(self, device: DeviceInfo) -> MemoryInfo:
        from hotplug.platforms.cpu.memory import host_memory

        return host_memory()

    def register(self, ops: OpRegistry) -> None:
        from hotplug.platforms.cpu.kernels import KERNELS

        for kernel in KERNELS:
            ops.add(kernel)

    def repack(self, weight: Sequence[torch.Tensor], spec: SiteSpec, provider: str) -> Sequence[torch.Tensor]:
        """Matrices in groups are packed for the native kernels; others stay as they are."""
        from hotplug.platforms.cpu.native import packed

        if provider != packed.PROVIDER or spec.op not in packed.PACKED_OPS:
            return weight
        return [packed.repack(data, spec["scheme"]) for data in weight]

    def share(self, device: DeviceInfo, rank: int, ranks: int) -> None:
        from hotplug.platforms.cpu.cores import take

        take(rank, ranks)

    def all_reduce(self, tensor: torch.Tensor, group: RankGroup) -> torch.Tensor:
        from hotplug.platforms.cpu.comm import all_reduce

        return all_reduce(tensor)

    def all_gather(self, tensor: torch.Tensor, group: RankGroup) -> torch.Tensor:
        from hotplug.platforms.cpu.comm import all_gather

        return all_gather(tensor)

    def capture(self, step: Callable[[], Any], device: DeviceInfo) -> Callable[[], Any]:
        from hotplug.platforms.cpu.capture import capture

        return capture(step)

    def buckets(self, max_tokens: int, max_requests: int) -> Sequence[tuple[int, int]]:
        """One, since a compiled step takes any size."""
        return [(max(max_tokens, max_requests + 1), max_requests)]

    def check_compile(self, spec: SiteSpec) -> Verdict:
        from hotplug.platforms.cpu.openvino.check import check

        return check(spec)

    def compile(self, program: StepProgram, device: DeviceInfo, cache: Path) -> Callable[..., Sequence[torch.Tensor]]:
        return self._compiler.compile(program, device.arch, cache)

    def fingerprint(self) -> str:
        from hotplug.platforms.cpu.openvino.compiler import fingerprint

        return fingerprint()

    def num_compiled(self) -> int:
        return self._compiler.num_compiled if "_compiler" in self.__dict__ else 0

    @functools.cached_property
    def _compiler(self) -> Compiler:
        from hotplug.platforms.cpu.openvino.compiler import Compiler

        return Compiler()

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: DeviceInfo) -> torch.Tensor:
        """Zeroed memory that the kernel maps page by page as blocks are first written."""
        import math

        import numpy as np
        import torch

        size = torch.empty((), dtype=dtype).element_size()
        # numpy's zeros come from calloc, so untouched blocks cost nothing; torch's would touch every page
        pages = np.zeros(math.prod(shape) * size, dtype=np.uint8)
        return torch.from_numpy(pages).view(dtype).view(*shape)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)


_ISAS = (
    ("amx_bf16", "amx"),
    ("avx512_bf16", "avx512_bf16"),
    ("avx512f", "avx512"),
    ("avx2", "avx2"),
    ("asimd", "neon"),
)
"""Kernel flag and our name for it, best first."""


def _cpuinfo() -> tuple[str, frozenset[str]]:
    """Model name and feature flags of the first processor; a plain name where the system does not say."""
    name, flags = host.processor() or host.machine(), frozenset[str]()
    try:
        with Path("/proc/cpuinfo").open() as f:
            for line in f:
                key, _, value = line.partition(":")
                match key.strip():
                    case "model name":
                        name = value.strip()
                    case "flags" | "Features":
                        flags = frozenset(value.split())
                        break
    except OSError:
        pass  # not Linux: the machine name is all there is
    return name, flags
