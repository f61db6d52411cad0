"""SwiGLU's gate and up product of many rows on Hopper, gated as it leaves the sums: the twice as wide product, which
a library writes out for another kernel to read, never reaches memory.

Written in Gluon as `linear_hopper` is: copies by hand into a ring of shared memory that runs on across the tiles of a
program, so that the tensor cores find the next tile's operands there while the last one is gated and stored.
"""

from __future__ import annotations

from functools import cache
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

from hotplug.platforms.cuda.kernels import pdl
from hotplug.platforms.cuda.kernels.linear_hopper import gate_sums, tile_layout

TOKENS, OUTPUTS, COLS, STAGES, WARPS = 128, 128, 64, 4, 8
"""A tile of the result, its steps over K, those in flight (192 of 227 KiB with 32 for the result), and who works."""


@gluon.jit
def _place(unit, tokens, tiles, whole, rest_at, program, steps: gl.constexpr, PROGRAMS: gl.constexpr,
           GROUP: gl.constexpr):  # fmt: skip
    """Of a program's `unit`: its tile's number, rows and outputs, and its step over K.

    The first `whole` tiles of a program are its own, PROGRAMS apart; the rest are dealt by step. Tiles are numbered
    down GROUP tiles of rows before the next outputs: programs at work at the same time share rows and weights in L2.
    """
    rest = rest_at + unit - whole * steps
    own = unit < whole * steps
    tile = gl.where(own, program + (unit // steps) * PROGRAMS, whole * PROGRAMS + rest // steps)
    step = gl.where(own, unit % steps, rest % steps)
    down = GROUP * (tiles // tokens)
    first = (tile // down) * GROUP
    high = gl.maximum(gl.minimum(tokens - first, GROUP), 1)  # past the last tile too
    return tile, first + (tile % down) % high, (tile % down) // high, step


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
def _gated(x, weight, out, bias, partial, counters, M, N, K: gl.constexpr, PROGRAMS: gl.constexpr, GROUP: gl.constexpr,
           STAGES: gl.constexpr, SPLIT: gl.constexpr, BIAS: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """x, weight and out are descriptors of tiles [rows, COLS], [outputs, COLS] and [rows, outputs], as many of each.

    Without SPLIT a program has whole tiles only. With it the tiles that do not make a round are dealt evenly, in steps;
    of the programs of such a tile the last one to end sums their parts, in order.
    """
    if PDL:
        gdc_launch_dependents()
    HIGH: gl.constexpr = x.block_shape[0]  # noqa: N806
    WIDE: gl.constexpr = x.block_shape[1]  # noqa: N806
    dtype: gl.constexpr = x.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 2 * HIGH, 16])
    steps: gl.constexpr = (K + WIDE - 1) // WIDE
    size: gl.constexpr = 2 * HIGH * HIGH
    ring = gl.allocate_shared_memory(dtype, [2 * STAGES, HIGH, WIDE], weight.layout)
    both = ring._reinterpret(dtype, [STAGES, 2 * HIGH, WIDE], weight.layout)
    ring_x = gl.allocate_shared_memory(dtype, [STAGES, HIGH, WIDE], x.layout)
    result = gl.allocate_shared_memory(dtype, [HIGH, HIGH], out.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()  # every thread sees the barriers before one is waited for

    program = gl.program_id(0)
    tokens = gl.cdiv(M, HIGH)
    tiles = tokens * gl.cdiv(N, HIGH)
    whole = tiles // PROGRAMS
    rest = (tiles - whole * PROGRAMS) * steps
    rest_at = program * rest // PROGRAMS
    count = whole * steps + (program + 1) * rest // PROGRAMS - rest_at
    if not SPLIT:
        rest_at = program * steps
        count = whole * steps + gl.where(program < tiles - whole * PROGRAMS, steps, 0)
    for i in gl.static_range(STAGES):
        _, _, output, step = _place(i, tokens, tiles, whole, rest_at, program, steps, PROGRAMS, GROUP)
        _copy_weight(weight, ring, bars, i, output, step, N, i < count)
    if PDL:
        gdc_wait()
    for i in gl.static_range(STAGES):
        _, row, _, step = _place(i, tokens, tiles, whole, rest_at, program, steps, PROGRAMS, GROUP)
        tma.async_copy_global_to_shared(x, [row * HIGH, step * WIDE], bars.index(i), ring_x.index(i), pred=i < count)

    _, next_row, next_output, next_step = _place(STAGES, tokens, tiles, whole, rest_at, program, steps, PROGRAMS, GROUP)
    done = 0
    while done < count:
        tile, row, output, begin = _place(done, tokens, tiles, whole, rest_at, program, steps, PROGRAMS, GROUP)
        stop = gl.minimum(begin + count - done, steps)
        total = gl.zeros([HIGH, 2 * HIGH], gl.float32, mma)
        for _ in range(begin, stop):
            slot = done % STAGES
            mbarrier.wait(bars.index(slot), (done // STAGES) & 1)
            total = warpgroup_mma(ring_x.index(slot), both.index(slot).permute((1, 0)), total, is_async=True)
            total = warpgroup_mma_wait(1, deps=(total,))
            gl.thread_barrier()  # every warp is done with the slot before, which is filled while this product runs on
            unit = done - 1 + STAGES
            if (done > 0) & (unit < count):
                free = unit % STAGES
                _copy_weight(weight, ring, bars, free, next_output, next_step, N, True)
                tma.async_copy_global_to_shared(x, [next_row * HIGH, next_step * WIDE], bars.index(free),
                                                ring_x.index(free))  # fmt: skip
                next_step += 1
                if next_step == steps:  # the tile after
                    _, next_row, next_output, next_step = _place(unit + 1, tokens, tiles, whole, rest_at, program,
                                                                 steps, PROGRAMS, GROUP)  # fmt: skip
            done += 1
        total = warpgroup_mma_wait(0, deps=(total,))
        last = True
        if SPLIT and stop - begin < steps:
            cells = (gl.arange(0, HIGH, gl.SliceLayout(1, mma))[:, None] * (2 * HIGH)
                     + gl.arange(0, 2 * HIGH, gl.SliceLayout(0, mma))[None, :])  # fmt: skip
            gl.store(partial + (2 * program + (begin == 0).to(gl.int32)).to(gl.int64) * size + cells, total)
            at = (tile - whole * PROGRAMS) * steps
            first = ((at + 1) * PROGRAMS - 1) // rest
            parts = ((at + steps) * PROGRAMS - 1) // rest - first + 1
            gl.thread_barrier()  # every thread's part is written before it is counted
            last = gl.atomic_add(counters + (tile - whole * PROGRAMS), 1, sem="acq_rel") == parts - 1
            if last:
                gl.store(counters + (tile - whole * PROGRAMS), 0)
                total = gl.zeros([HIGH, 2 * HIGH], gl.float32, mma)
                for part in range(parts):
                    place = partial + (2 * (first + part) + (part == 0).to(gl.int32)).to(gl.int64) * size + cells
                    total += gl.load(place, cache_modifier=".cg")
        if last:
            if BIAS:
                own = gl.arange(0, 2 * HIGH, gl.SliceLayout(0, mma))
                own = gl.where(own < HIGH, output * HIGH + own, N + output * HIGH + own - HIGH)
                total += gl.load(bias + own, mask=own < 2 * N, other=0.0).to(gl.float32)[None, :]
            gate, up = total.reshape([HIGH, 2, HIGH]).permute((0, 2, 1)).split()
            tma.store_wait(0)  # the tile before has left
            gl.thread_barrier()
            result.store(gate_sums(gate, up, dtype))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(out, [row * HIGH, output * HIGH], result)
    tma.store_wait(0)


@cache
def _space(device: torch.device, programs: int) -> tuple[Tensor, Tensor]:
    """Parts of tiles, and zeros that `_gated` counts in and leaves zero."""
    parts = torch.empty(2 * programs * 2 * TOKENS * OUTPUTS, dtype=torch.float32, device=device)
    return parts, torch.zeros(programs, dtype=torch.int32, device=device)


def _arguments(x: Tensor, weight: Tensor, bias: Tensor | None, *, split: bool, group: int, programs: int,
               stages: int) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """What `gated` returns, and what it launches `_gated` with: arguments, options."""
    m, k = x.shape
    n = weight.shape[0] // 2
    if x.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16:
        raise TypeError(f"gated takes bfloat16, not {x.dtype} and {weight.dtype}")
    if not m or k % 8 or n % OUTPUTS:
        raise ValueError(f"gated takes rows, K a multiple of 8 and N of {OUTPUTS}, not M = {m}, K = {k}, N = {n}")
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    operand, result = tile_layout(TOKENS, COLS), tile_layout(TOKENS, OUTPUTS)
    partial, counters = _space(x.device, programs) if split else (out, out)
    return out, (
        TensorDescriptor.from_tensor(x, [TOKENS, COLS], operand),
        TensorDescriptor.from_tensor(weight, [OUTPUTS, COLS], operand),
        TensorDescriptor.from_tensor(out, [TOKENS, OUTPUTS], result),
        bias, partial, counters, m, n, k, programs, group, stages, split, bias is not None,
    ), {"num_warps": WARPS, **pdl.options(x.device)}  # fmt: skip


def gated(x: Tensor, weight: Tensor, bias: Tensor | None, *, split: bool = False, group: int = 16,
          programs: int = 132, stages: int = STAGES) -> Tensor:  # fmt: skip
    """`x` [M, K] times `weight` [2N, K] transposed, gated: [M, N].

    bfloat16 with K a multiple of 8 and N of 128, on a device of compute capability 9.0. `split` deals the tiles of
    the last round evenly, which pays where there are few rounds. Raises TypeError and ValueError.
    """
    out, arguments, options = _arguments(x, weight, bias, split=split, group=group, programs=programs, stages=stages)
    _gated[(programs,)](*arguments, **options)
    return out


def compile_for(x: Tensor, weight: Tensor, bias: Tensor | None, *, split: bool = False, group: int = 16,
                programs: int = 132, stages: int = STAGES) -> Any:  # fmt: skip
    """The compiled kernel of such a call of `gated`, which is not launched."""
    _, arguments, options = _arguments(x, weight, bias, split=split, group=group, programs=programs, stages=stages)
    return _gated.warmup(*arguments, grid=(programs,), **options)
