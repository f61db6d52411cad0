"""A platform that compiles whole steps: four shapes, 32-token KV blocks, int32 indices, no step of mixed phase."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hotplug.vendor import DeviceInfo, ExecMode, Impl, Limits, MemoryInfo, OpRegistry, StepProgram


class ToyCompile:
    name = "toy_compile"
    torch_device = "cpu"
    api_version = "2.0"

    def __init__(self) -> None:
        self._num_compiled = 0

    def probe(self) -> Sequence[DeviceInfo]:
        return [DeviceInfo(index=0, name="Toy Compile", arch="toy")]

    def limits(self, device: DeviceInfo) -> Limits:
        return Limits(
            dtypes=("float32",),
            block_sizes=(32,),
            index_dtype="int32",
            exec_modes=(ExecMode.COMPILE, ExecMode.EAGER),
            max_graph_shapes=4,
            mixed_steps=False,
            shared_host_memory=True,
        )

    def memory(self, device: DeviceInfo) -> MemoryInfo:
        page = os.sysconf("SC_PAGE_SIZE")
        return MemoryInfo(free=page * os.sysconf("SC_AVPHYS_PAGES"), total=page * os.sysconf("SC_PHYS_PAGES"))

    def register(self, ops: OpRegistry) -> None:
        from toy_compile.machine import silu_mul  # imports torch

        ops.add(Impl("silu_mul", "toy_compile", make=lambda _: silu_mul))

    def buckets(self, max_tokens: int, max_requests: int) -> Sequence[tuple[int, int]]:
        decodes = [(1, 1), (max_requests, max_requests)]
        prompts = [(min(size, max_tokens), 1) for size in (32, 256)]
        return list(dict.fromkeys(decodes + [(max(tokens, 2), 1) for tokens, _ in prompts]))

    def compile(self, program: StepProgram, device: DeviceInfo, cache: Path) -> Callable[..., Any]:
        from toy_compile import compiler, machine

        artifact = cache / "step.json"
        if not artifact.exists():
            compiler.save(compiler.lower(program), artifact)
            self._num_compiled += 1
        return machine.load(artifact, program.weights)

    def fingerprint(self) -> str:
        return "toy machine 1"

    def num_compiled(self) -> int:
        return self._num_compiled
