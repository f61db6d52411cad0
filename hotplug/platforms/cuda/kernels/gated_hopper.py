"""SwiGLU's gate and up product of many rows on Hopper, gated as it leaves the sums: the twice as wide product, which
a library writes out for another kernel to read, never reaches memory.

Written in Gluon as `linear_hopper` is: copies by hand into a ring of shared memory that runs on across the tiles of a
program, so that the tensor cores find the next tile's operands there while the last one is gated and stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hotplug.platforms.cuda.kernels import gpu, pdl
from hotplug.platforms.cuda.kernels.barrier import thread_barrier
from hotplug.platforms.cuda.kernels.linear_hopper import gate_sums, tile_layout

TOKENS, OUTPUTS, COLS, STAGES, WARPS = 128, 128, 64, 4, 8
"""A tile of the result, its steps over K, those in flight (192 of 227 KiB with 32 for the result), and who works."""


@gluon.jit
def _place(tile, M, N, HIGH: gl.constexpr, GROUP: gl.constexpr):
    """A tile's place among those of rows and of outputs. They are numbered down GROUP tiles of rows before the next
    outputs, so that programs at work at the same time share rows and weights in L2.
    """
    down = GROUP * gl.cdiv(N, HIGH)
    first = (tile // down) * GROUP
    high = gl.maximum(gl.minimum(gl.cdiv(M, HIGH) - first, GROUP), 1)  # past the last tile too
    return first + (tile % down) % high, (tile % down) // high


@gluon.jit
def _copy_weight(weight, ring, bars, slot, output, step, N, pred):
    """Request the weights of a step, gate's and up's, into `slot`, whose barrier awaits them and x."""
    HIGH: gl.constexpr = weight.block_shape[0]  # noqa: N806
    WIDE: gl.constexpr = weight.block_shape[1]  # noqa: N806
    mbarrier.expect(bars.index(slot), 3 * HIGH * WIDE * 2, pred=pred)
    tma.async_copy_global_to_shared(weight, [output * HIGH, step * WIDE], bars.index(slot), ring.index(2 * slot),
                                    pred=pred)  # fmt: skip
    tma.async_copy_global_to_shared(weight, [N + output * HIGH, step * WIDE], bars.index(slot),
                                    ring.index(2 * slot + 1), pred=pred)  # fmt: skip


@gluon.jit(do_not_specialize=["M"])
def _gated(x, weight, out, bias, M, N, K: gl.constexpr, PROGRAMS: gl.constexpr, GROUP: gl.constexpr,
           STAGES: gl.constexpr, BIAS: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """x, weight and out are descriptors of tiles [rows, COLS], [outputs, COLS] and [rows, outputs], as many of each.

    A program has every PROGRAMS-th tile. The steps of all its tiles pass through the ring one after the other; a slot
    is filled again while the product after the one that read it runs. What is copied from beyond a tensor is 0, and
    what is copied there is dropped.
    """
    if PDL:
        gdc_launch_dependents()
    HIGH: gl.constexpr = x.block_shape[0]  # noqa: N806
    WIDE: gl.constexpr = x.block_shape[1]  # noqa: N806
    dtype: gl.constexpr = x.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 2 * HIGH, 16])
    steps: gl.constexpr = (K + WIDE - 1) // WIDE
    ring = gl.allocate_shared_memory(dtype, [2 * STAGES, HIGH, WIDE], weight.layout)
    both = ring._reinterpret(dtype, [STAGES, 2 * HIGH, WIDE], weight.layout)
    ring_x = gl.allocate_shared_memory(dtype, [STAGES, HIGH, WIDE], x.layout)
    result = gl.allocate_shared_memory(dtype, [HIGH, HIGH], out.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    thread_barrier()  # every thread sees the barriers before one is waited for

    tiles = gl.cdiv(M, HIGH) * gl.cdiv(N, HIGH)
    count = gl.cdiv(tiles - gl.program_id(0), PROGRAMS) * steps
    ahead = gl.program_id(0)  # the tile whose steps are asked for
    step = 0
    row, output = _place(ahead, M, N, HIGH, GROUP)
    for i in gl.static_range(STAGES):
        _copy_weight(weight, ring, bars, i, output, i, N, i < count)
    if PDL:
        gdc_wait()
    for i in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(x, [row * HIGH, i * WIDE], bars.index(i), ring_x.index(i), pred=i < count)
    step += STAGES

    done = 0
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        total = gl.zeros([HIGH, 2 * HIGH], gl.float32, mma)
        for _ in range(steps):
            slot = done % STAGES
            mbarrier.wait(bars.index(slot), (done // STAGES) & 1)
            total = warpgroup_mma(ring_x.index(slot), both.index(slot).permute((1, 0)), total, is_async=True)
            total = warpgroup_mma_wait(1, deps=(total,))
            thread_barrier()  # every warp is done with the slot before
            unit = done - 1 + STAGES
            if (done > 0) & (unit < count):
                if step == steps:
                    step = 0
                    ahead += PROGRAMS
                    row, output = _place(ahead, M, N, HIGH, GROUP)
                free = unit % STAGES
                _copy_weight(weight, ring, bars, free, output, step, N, True)
                tma.async_copy_global_to_shared(x, [row * HIGH, step * WIDE], bars.index(free), ring_x.index(free))
                step += 1
            done += 1
        total = warpgroup_mma_wait(0, deps=(total,))
        own_row, own_output = _place(tile, M, N, HIGH, GROUP)
        if BIAS:
            own = gl.arange(0, 2 * HIGH, gl.SliceLayout(0, mma))
            own = gl.where(own < HIGH, own_output * HIGH + own, N + own_output * HIGH + own - HIGH)
            total += gl.load(bias + own).to(gl.float32)[None, :]
        gate, up = total.reshape([HIGH, 2, HIGH]).permute((0, 2, 1)).split()
        tma.store_wait(0)  # the tile before has left
        thread_barrier()
        result.store(gate_sums(gate, up, dtype))
        fence_async_shared()
        thread_barrier()
        tma.async_copy_shared_to_global(out, [own_row * HIGH, own_output * HIGH], result)
    tma.store_wait(0)


def _arguments(x: Tensor, weight: Tensor, bias: Tensor | None,
               group: int) -> tuple[Tensor, int, tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """What `gated` returns, and what it launches `_gated` with: programs, arguments, options."""
    m, k = x.shape
    n = weight.shape[0] // 2
    if x.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16:
        raise TypeError(f"gated takes bfloat16, not {x.dtype} and {weight.dtype}")
    if not m or k % 8 or k < STAGES * COLS or n % OUTPUTS:
        raise ValueError(f"gated takes rows, K a multiple of 8 from {STAGES * COLS} on and N of {OUTPUTS}, not "
                         f"M = {m}, K = {k}, N = {n}")  # fmt: skip
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    operand, result = tile_layout(TOKENS, COLS), tile_layout(TOKENS, OUTPUTS)
    programs = gpu.multiprocessors(x.device)
    return out, programs, (
        TensorDescriptor.from_tensor(x, [TOKENS, COLS], operand),
        TensorDescriptor.from_tensor(weight, [OUTPUTS, COLS], operand),
        TensorDescriptor.from_tensor(out, [TOKENS, OUTPUTS], result),
        bias, m, n, k, programs, group, STAGES, bias is not None,
    ), {"num_warps": WARPS, **pdl.options(x.device)}  # fmt: skip


def gated(x: Tensor, weight: Tensor, bias: Tensor | None, *, group: int = 16) -> Tensor:
    """`x` [M, K] times `weight` [2N, K] transposed, gated: [M, N].

    bfloat16 with K a multiple of 8 from 256 on and N one of 128, on a device of compute capability 9.0; a program a
    multiprocessor. Raises TypeError and ValueError.
    """
    out, programs, arguments, options = _arguments(x, weight, bias, group)
    _gated[(programs,)](*arguments, **options)
    return out


def compile_for(x: Tensor, weight: Tensor, bias: Tensor | None, *, group: int = 16) -> Any:
    """The compiled kernel of such a call of `gated`, which is not launched."""
    _, programs, arguments, options = _arguments(x, weight, bias, group)
    return _gated.warmup(*arguments, grid=(programs,), **options)
