"""Products and attention of the CPU's native library, called by themselves as a step does, in one thread.

What is measured is that thread's processor time, which does not count what others do on the core meanwhile.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from inspect import signature
from typing import Any

from track.probes.places import CannotError, find

COLS, OUTS = 576, 3072
"""SmolLM2-135M's gate and up."""
LINEAR = {"kernel-linear-1": (1, 600), "kernel-linear-16": (16, 200), "kernel-linear-128": (128, 60)}
"""Rows, and calls of a run."""
ATTENTION = {"kernel-attention-16": ([(1, 200)] * 16, 90), "kernel-attention-prompt": ([(256, 512)], 30)}
"""New and all tokens of each request, and calls of a run."""
LAYERS, HEADS, KV_HEADS, DIM, BLOCK = 30, 9, 3, 64, 16


class Kernels:
    """Each kernel is made when it is first asked for."""

    plan_hash: str | None = None

    def __init__(self) -> None:
        if find("load", "hotplug.platforms.cpu.native.library")().set_threads(1) != 1:
            raise CannotError("the library does not run in one thread")
        self._made: dict[str, tuple[Callable[[], object], int]] = {}

    def measure(self, probe: str) -> dict[str, float]:
        """Microseconds of a call, the mean of a run. Raises CannotError where this tree has no such kernel."""
        if probe not in self._made:
            self._made[probe] = _linear(probe) if probe in LINEAR else _attention(probe)
        call, calls = self._made[probe]
        for _ in range(3):
            call()
        begin = time.thread_time()
        for _ in range(calls):
            call()
        return {probe: (time.thread_time() - begin) / calls * 1e6}


def _linear(probe: str) -> tuple[Callable[[], object], int]:
    import gguf
    import torch

    module = "hotplug.platforms.cpu.native.linear"
    pack, linear = (find(name, module) for name in ("pack", "linear"))
    rows, calls = LINEAR[probe]
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTS, COLS, generator=draw).numpy()
    # One weight, which the caches hold: where many lie in memory differs by process, and with it the time by a tenth.
    packed = pack("Q4_1", gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_1), OUTS, COLS)
    x = torch.randn(rows, COLS, generator=draw)
    return lambda: linear(x, packed), calls


def _attention(probe: str) -> tuple[Callable[[], object], int]:
    """A call is one layer's; caches of all layers are gone through in turn."""
    import torch
    from cpu_attention import step_of

    attention: Any = find("attention", "hotplug.platforms.cpu.native.attention")
    rest: tuple[Any, ...] = (DIM**-0.5, None, "NHD")  # before interface 2.0
    if len(signature(attention).parameters) == 1:
        attention, rest = attention(_site()), (None,)
    lens, calls = ATTENTION[probe]
    step, blocks = step_of(lens, BLOCK, 0)
    draw = torch.Generator().manual_seed(0)
    caches = torch.randn(LAYERS, 2, blocks, BLOCK, KV_HEADS, DIM, generator=draw)
    q = torch.randn(sum(n for n, _ in lens), HEADS, DIM, generator=draw)
    turn = itertools.cycle(range(LAYERS))

    def call() -> object:
        layer = next(turn)
        return attention(q, caches[layer][0], caches[layer][1], step, *rest)

    try:
        call()
    except TypeError as e:
        raise CannotError(f"attention has other arguments here: {e}") from e
    return call, calls


def _site() -> Any:
    """The call site that a kernel is made for."""
    from hotplug.core.ops.registry import SiteSpec

    facts = {"scale": DIM**-0.5, "window": None, "soft_cap": None, "layout": "NHD"}
    return SiteSpec("attention", "probe", "float32", "any", facts)


def start(options: dict[str, Any]) -> Kernels:
    return Kernels()
