"""Linear layers of few rows on Hopper, where the first weights are on their way before the kernel before has ended.

Written in Gluon, because what this needs Triton's compiler does not do: copy by hand into a ring of shared memory, so
that weights, which no kernel of the step writes, are requested before `griddepcontrol.wait` and `x` after it. In a
chain of such kernels the memory never idles while one drains and the next starts up. Results: those of `skinny`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
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

from hotplug.platforms.cuda.kernels import pdl
from hotplug.platforms.cuda.kernels.barrier import thread_barrier

MOST_ROWS = 64
"""Rows of `x` that `stream` takes."""
_COUNTERS = 1 << 16


@gluon.jit
def _copy_weight(weight, ring, ring_up, bars, unit, slot, N, steps: gl.constexpr, X_BYTES: gl.constexpr,
                 GATED: gl.constexpr, pred):  # fmt: skip
    """Request the weights of `unit` (tile * steps + step) into `slot`, whose barrier awaits them and a tile of x."""
    ROWS: gl.constexpr = ring.shape[1]  # noqa: N806
    COLS: gl.constexpr = ring.shape[2]  # noqa: N806
    tile = unit // steps
    col = (unit - tile * steps) * COLS
    bar = bars.index(slot)
    mbarrier.expect(bar, ROWS * COLS * (4 if GATED else 2) + X_BYTES, pred=pred)
    tma.async_copy_global_to_shared(weight, [tile * ROWS, col], bar, ring.index(slot), pred=pred)
    if GATED:
        tma.async_copy_global_to_shared(weight, [N + tile * ROWS, col], bar, ring_up.index(slot), pred=pred)


@gluon.jit
def _copy_x(x, ring_x, bars, unit, slot, steps: gl.constexpr, pred):
    """Request the tile of x of `unit` into `slot`."""
    COLS: gl.constexpr = ring_x.shape[2]  # noqa: N806
    tma.async_copy_global_to_shared(x, [0, (unit % steps) * COLS], bars.index(slot), ring_x.index(slot), pred=pred)


@gluon.jit
def gate_sums(gate, up, dtype: gl.constexpr):
    """SwiGLU's gating of two sums, rounded where the separate operations round."""
    gate = gate.to(dtype).to(gl.float32)
    silu = (gate / (1 + gl.exp(-gate))).to(dtype).to(gl.float32)
    return (silu * up.to(dtype).to(gl.float32)).to(dtype)


@gluon.jit
def _sum_parts(total, partial, cells, first, parts, size: gl.constexpr, offset: gl.constexpr):
    """`total` (zeros) plus the parts that the programs from `first` on have left, in their order, two loads at once.

    A program leaves the part of a tile that it began in the middle in its place 0, and that of its last one in 1.
    """
    for i in range(0, parts, 2):
        place = partial + (2 * (first + i) + (i == 0).to(gl.int32)) * size + offset + cells
        value = gl.load(place, cache_modifier=".cg")
        after = partial + 2 * (first + i + 1) * size + offset + cells
        value_after = gl.load(after, mask=gl.full_like(cells, 0) + i + 1 < parts, other=0.0, cache_modifier=".cg")
        total = total + value + value_after
    return total


@gluon.jit(do_not_specialize=["M"])
def _stream(x, weight, bias, out, partial, counters, M, N, K: gl.constexpr, PROGRAMS: gl.constexpr,
            STAGES: gl.constexpr, GATED: gl.constexpr, BIAS: gl.constexpr, OVERLAP: gl.constexpr,
            PDL: gl.constexpr):  # fmt: skip
    """All M <= TOKENS rows of x; tiles of ROWS outputs times steps over K, dealt evenly to the programs (stream-K,
    Osama et al., 2023). x and weight are descriptors of tiles [TOKENS, COLS] and [ROWS, COLS].

    A program's units of work are numbered from `at` on across its tiles, and pass through the ring of STAGES slots in
    that order; a slot is filled again once the product that read it is done. Of the programs of a tile the last one to
    end sums their parts, in order, so that the result is always the same. What is copied from beyond a tensor is 0.
    """
    if PDL:
        gdc_launch_dependents()
    TOKENS: gl.constexpr = x.block_shape[0]  # noqa: N806
    ROWS: gl.constexpr = weight.block_shape[0]  # noqa: N806
    COLS: gl.constexpr = weight.block_shape[1]  # noqa: N806
    dtype: gl.constexpr = x.dtype
    warps: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, TOKENS, 16])
    steps: gl.constexpr = (K + COLS - 1) // COLS
    x_bytes: gl.constexpr = TOKENS * COLS * 2
    size: gl.constexpr = ROWS * TOKENS * (2 if GATED else 1)
    ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, COLS], weight.layout)
    ring_x = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, COLS], x.layout)
    ring_up = ring
    if GATED:
        ring_up = gl.allocate_shared_memory(dtype, [STAGES, ROWS, COLS], weight.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    thread_barrier()  # every thread sees the barriers before one is waited for

    units = gl.cdiv(N, ROWS) * steps
    at = gl.program_id(0) * units // PROGRAMS
    count = (gl.program_id(0) + 1) * units // PROGRAMS - at
    for i in gl.static_range(STAGES):
        _copy_weight(weight, ring, ring_up, bars, at + i, i, N, steps, x_bytes, GATED, i < count)
    if PDL:
        gdc_wait()
    for i in gl.static_range(STAGES):
        _copy_x(x, ring_x, bars, at + i, i, steps, i < count)

    done = 0
    while done < count:
        tile = (at + done) // steps
        begin = at + done - tile * steps
        stop = gl.minimum(begin + count - done, steps)
        total = gl.zeros([ROWS, TOKENS], gl.float32, mma)
        total_up = total
        for _ in range(begin, stop):
            slot = done % STAGES
            mbarrier.wait(bars.index(slot), (done // STAGES) & 1)
            vectors = ring_x.index(slot).permute((1, 0))
            total = warpgroup_mma(ring.index(slot), vectors, total, is_async=True)
            if GATED:
                total_up = warpgroup_mma(ring_up.index(slot), vectors, total_up, is_async=True)
            # With OVERLAP this product runs on while the slot of the one before is filled, else its own is.
            if GATED:
                total, total_up = warpgroup_mma_wait(2 if OVERLAP else 0, deps=(total, total_up))
            else:
                total = warpgroup_mma_wait(1 if OVERLAP else 0, deps=(total,))
            thread_barrier()  # every warp is done with the slot
            free = done - 1 if OVERLAP else done
            more = (free >= 0) & (free + STAGES < count)
            slot = (free + STAGES) % STAGES
            _copy_weight(weight, ring, ring_up, bars, at + free + STAGES, slot, N, steps, x_bytes, GATED, more)
            _copy_x(x, ring_x, bars, at + free + STAGES, slot, steps, more)
            done += 1
        if OVERLAP:
            if GATED:
                total, total_up = warpgroup_mma_wait(0, deps=(total, total_up))
            else:
                total = warpgroup_mma_wait(0, deps=(total,))
        last = True
        if stop - begin < steps:
            cells = (gl.arange(0, ROWS, gl.SliceLayout(1, mma))[:, None] * TOKENS
                     + gl.arange(0, TOKENS, gl.SliceLayout(0, mma))[None, :])  # fmt: skip
            place = partial + (2 * gl.program_id(0) + (begin == 0).to(gl.int32)) * size + cells
            gl.store(place, total)
            if GATED:
                gl.store(place + ROWS * TOKENS, total_up)
            first = ((tile * steps + 1) * PROGRAMS - 1) // units
            parts = ((tile * steps + steps) * PROGRAMS - 1) // units - first + 1
            thread_barrier()  # every thread's part is written before it is counted
            last = gl.atomic_add(counters + tile, 1, sem="acq_rel") == parts - 1
            if last:
                gl.store(counters + tile, 0)
                zeros = gl.zeros([ROWS, TOKENS], gl.float32, mma)
                total = _sum_parts(zeros, partial, cells, first, parts, size, 0)
                if GATED:
                    total_up = _sum_parts(zeros, partial, cells, first, parts, size, ROWS * TOKENS)
        if last:
            _finish(total, total_up, bias, out, tile, M, N, dtype, GATED, BIAS)


@gluon.jit
def _finish(total, total_up, bias, out, tile, M, N, dtype: gl.constexpr, GATED: gl.constexpr, BIAS: gl.constexpr):
    """Bias, gating, and the store of a tile [ROWS, TOKENS] to `out` [M, N]: outputs lie along a row there."""
    ROWS: gl.constexpr = total.shape[0]  # noqa: N806
    TOKENS: gl.constexpr = total.shape[1]  # noqa: N806
    warps: gl.constexpr = gl.num_warps()
    across: gl.constexpr = 16 if ROWS >= 128 else 8
    lines: gl.constexpr = gl.BlockedLayout([8, 1], [across, 32 // across], [1, warps], [0, 1])
    if BIAS:
        own = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, total.type.layout))
        total += gl.load(bias + own, mask=own < N, other=0.0).to(gl.float32)[:, None]
        if GATED:
            total_up += gl.load(bias + N + own, mask=own < N, other=0.0).to(gl.float32)[:, None]
    if GATED:
        total = gate_sums(total, total_up, dtype)
    result = gl.convert_layout(total.to(out.dtype.element_ty), lines)
    rows = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, lines))
    tokens = gl.arange(0, TOKENS, gl.SliceLayout(0, lines))
    target = out + tokens[None, :].to(gl.int64) * N + rows[:, None]
    gl.store(target, result, mask=(rows < N)[:, None] & (tokens < M)[None, :])


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros that `_stream` counts in and leaves zero."""
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


def tile_layout(rows: int, cols: int) -> gl.NVMMASharedLayout:
    """How a tile [rows, cols] of bfloat16 lies in shared memory: swizzled, so that wgmma can read it."""
    return gl.NVMMASharedLayout.get_default_for([rows, cols], gl.bfloat16)


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool, dtype: torch.dtype, rows: int, cols: int,
    stages: int, programs: int, warps: int, overlap: bool = True,
) -> tuple[Tensor, int, tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """What `stream` returns, and what it launches `_stream` with: programs, arguments, options."""
    m, k = x.shape
    n = weight.shape[0] // (2 if gated else 1)
    if x.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16:
        raise TypeError(f"stream takes bfloat16, not {x.dtype} and {weight.dtype}")
    if not 0 < m <= MOST_ROWS or k % 8:
        raise ValueError(f"stream takes 1 to {MOST_ROWS} rows and K a multiple of 8, not {m} rows and K = {k}")
    if rows % (16 * warps) or warps % 4 or stages < 2:
        raise ValueError(f"{rows=}, {warps=}, {stages=}: whole warpgroups of at least 16 rows a warp, and 2 stages")
    tokens = max(triton.next_power_of_2(m), 16)
    tiles, steps = triton.cdiv(n, rows), triton.cdiv(k, cols)
    programs = min(programs, tiles * steps)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    partial: Any = out
    if tiles % programs:  # some tile is dealt to several programs
        size = 2 * programs * rows * tokens * (2 if gated else 1)
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
    tiles_of_x = TensorDescriptor.from_tensor(x, [tokens, cols], tile_layout(tokens, cols))
    tiles_of_weight = TensorDescriptor.from_tensor(weight, [rows, cols], tile_layout(rows, cols))
    arguments = (tiles_of_x, tiles_of_weight, bias, out, partial, _counters(x.device), m, n, k, programs, stages, gated,
                 bias is not None, overlap)  # fmt: skip
    return out, programs, arguments, {"num_warps": warps, **pdl.options(x.device)}


def stream(x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool, dtype: torch.dtype, rows: int, cols: int,
           stages: int, programs: int, warps: int, overlap: bool = True) -> Tensor:  # fmt: skip
    """`x` [M <= 64, K] times `weight` [N or 2N, K] transposed, gated if asked; [M, N] of `dtype`.

    bfloat16 with K a multiple of 8, on a device of compute capability 9.0. `rows` outputs (a multiple of 16 for each
    of 4 or 8 `warps`) times `cols` of K make a step, of which `stages` are in flight. Raises TypeError and ValueError.
    """
    out, grid, arguments, options = _arguments(x, weight, bias, gated=gated, dtype=dtype, rows=rows, cols=cols,
                                               stages=stages, programs=programs, warps=warps,
                                               overlap=overlap)  # fmt: skip
    _stream[(grid,)](*arguments, **options)
    return out


def compile_for(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Any:
    """The compiled kernel of such a call of `stream`, which is not launched."""
    _, grid, arguments, launch_options = _arguments(x, weight, bias, **options)
    return _stream.warmup(*arguments, grid=(grid,), **launch_options)
