"""Linear layers of few rows in Triton, where reading the weight is most of the work: one row by dot products, up to 256
by matrix instructions with the weight as their left side. Both with the gating of SwiGLU if asked for.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hotplug.platforms.cuda.kernels import pdl

MOST_ROWS = 256
"""Rows of `x` that `skinny` takes."""
_COUNTERS = 1 << 16


@triton.jit
def _gate(gate, up, dtype: tl.constexpr):
    """SwiGLU's gating of two sums, rounded where the separate operations round."""
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (silu * up.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _gemv(x, weight, bias, out, N, K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr,
          GATED: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program ROWS outputs of one row x [K]; the first COLS of their weights are read before x is waited for."""
    pdl.release(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    there = (rows < N)[:, None]
    source = weight + rows[:, None].to(tl.int64) * K + cols[None, :]
    more = tl.cast(N, tl.int64) * K  # from gate to up; one output makes N no tensor
    mask = there if EVEN else there & (cols < K)[None, :]
    value = tl.load(source, mask=mask, other=0.0)
    if GATED:
        value_up = tl.load(source + more, mask=mask, other=0.0)
    pdl.wait(PDL)
    vector = tl.load(x + cols).to(tl.float32) if EVEN else tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
    total = value.to(tl.float32) * vector[None, :]
    if GATED:
        total_up = value_up.to(tl.float32) * vector[None, :]
    for start in range(COLS, K, COLS):
        if EVEN:
            mask = there
            vector = tl.load(x + start + cols).to(tl.float32)
        else:
            mask = there & (start + cols < K)[None, :]
            vector = tl.load(x + start + cols, mask=start + cols < K, other=0.0).to(tl.float32)
        total += tl.load(source + start, mask=mask, other=0.0).to(tl.float32) * vector[None, :]
        if GATED:
            total_up += tl.load(source + more + start, mask=mask, other=0.0).to(tl.float32) * vector[None, :]
    result = tl.sum(total, 1)
    if BIAS:
        result += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    if GATED:
        result_up = tl.sum(total_up, 1)
        if BIAS:
            result_up += tl.load(bias + N + rows, mask=rows < N, other=0.0).to(tl.float32)
        tl.store(out + rows, _gate(result, result_up, x.dtype.element_ty), mask=rows < N)
    else:
        tl.store(out + rows, result, mask=rows < N)


@triton.jit(do_not_specialize=["M"])
def _skinny(x, tiles_of_x, tiles_of_weight, tiles_of_out, bias, out, partial, counters, M, N, K: tl.constexpr,
            TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PROGRAMS: tl.constexpr, SPLIT: tl.constexpr,
            STAGES: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ALIGNED: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """All M <= TOKENS rows of x; tiles of ROWS outputs times steps over K, dealt evenly to the programs (stream-K,
    Osama et al., 2023).

    SPLIT: whether some tile has several programs. Of those the last one to end sums their parts, in order, so that the
    result is always the same. What a descriptor reads beyond its tensor is 0, and what it writes there is dropped.
    """
    pdl.release(PDL)
    steps: tl.constexpr = triton.cdiv(K, COLS)
    tiles = tl.cdiv(N, ROWS)
    share = tl.cdiv(tiles * steps, PROGRAMS)
    at = tl.program_id(0) * share
    end = tl.minimum(at + share, tiles * steps)
    pdl.wait(PDL)
    tokens = tl.arange(0, TOKENS)
    cells = tl.arange(0, ROWS)[:, None] * TOKENS + tokens[None, :]
    size: tl.constexpr = ROWS * TOKENS * (2 if GATED else 1)
    most = (steps - 1) // share + 2  # parts that a tile can have
    while at < end:
        tile = at // steps
        begin = at - tile * steps
        stop = tl.minimum(end - tile * steps, steps)
        rows = tile * ROWS + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, TOKENS], tl.float32)
        total_up = tl.zeros([ROWS, TOKENS], tl.float32)
        for step in tl.range(begin, stop, num_stages=STAGES):
            vectors = tl.trans(tiles_of_x.load([0, step * COLS]))
            value = tiles_of_weight.load([tile * ROWS, step * COLS])
            total = tl.dot(value, vectors, total, input_precision="ieee")
            if GATED:
                value_up = tiles_of_weight.load([N + tile * ROWS, step * COLS])
                total_up = tl.dot(value_up, vectors, total_up, input_precision="ieee")
        last = True
        if SPLIT and stop - begin < steps:
            first = tile * steps // share
            parts = (tile * steps + steps - 1) // share - first + 1
            place = partial + tile.to(tl.int64) * most * size + cells
            tl.store(place + (tl.program_id(0) - first) * size, total)
            if GATED:
                tl.store(place + (tl.program_id(0) - first) * size + ROWS * TOKENS, total_up)
            tl.debug_barrier()  # every thread's part is written before it is counted
            last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == parts - 1
            if last:
                tl.store(counters + tile, 0)
                total = tl.zeros([ROWS, TOKENS], tl.float32)
                total_up = tl.zeros([ROWS, TOKENS], tl.float32)
                for i in tl.range(0, parts, num_stages=1):
                    total += tl.load(place + i * size, cache_modifier=".cg")
                    if GATED:
                        total_up += tl.load(place + i * size + ROWS * TOKENS, cache_modifier=".cg")
        if last:
            if BIAS:
                total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
            if GATED:
                if BIAS:
                    total_up += tl.load(bias + N + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
                result = _gate(total, total_up, x.dtype.element_ty)
            else:
                result = total.to(out.dtype.element_ty)
            if ALIGNED:
                tiles_of_out.store([0, tile * ROWS], tl.trans(result))
            else:
                mask = (rows < N)[:, None] & (tokens < M)[None, :]
                tl.store(out + tokens[None, :].to(tl.int64) * N + rows[:, None], result, mask=mask)
        at = tile * steps + stop


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros that `_skinny` counts in and leaves zero."""
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool, dtype: torch.dtype, rows: int, cols: int,
         warps: int) -> Tensor:  # fmt: skip
    """`x` [1, K] times `weight` [N or 2N, K] transposed, gated if asked; [1, N] of `dtype`."""
    k, n = weight.shape[1], weight.shape[0] // (2 if gated else 1)
    out = torch.empty((1, n), dtype=dtype, device=x.device)
    cols = min(cols, triton.next_power_of_2(k))
    _gemv[(triton.cdiv(n, rows),)](x, weight, bias, out, n, k, rows, cols, k % cols == 0, gated, bias is not None,
                                   num_warps=warps, **pdl.options(x.device))  # fmt: skip
    return out


def skinny(x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool, dtype: torch.dtype, rows: int, cols: int,
           programs: int, stages: int, warps: int) -> Tensor:  # fmt: skip
    """`x` [M <= 256, K] times `weight` [N or 2N, K] transposed, gated if asked; [M, N] of `dtype`."""
    m, k = x.shape
    n = weight.shape[0] // (2 if gated else 1)
    tokens = max(triton.next_power_of_2(m), 16)
    tiles, steps = triton.cdiv(n, rows), triton.cdiv(k, cols)
    share = triton.cdiv(tiles * steps, programs)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    partial: Any = out
    split = share % steps != 0
    if split:
        size = tiles * ((steps - 1) // share + 2) * rows * tokens * (2 if gated else 1)
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
    tiles_of_x = TensorDescriptor.from_tensor(x, [tokens, cols])
    tiles_of_weight = TensorDescriptor.from_tensor(weight, [rows, cols])
    aligned = n * out.element_size() % 16 == 0
    tiles_of_out = TensorDescriptor.from_tensor(out, [tokens, rows]) if aligned else tiles_of_x
    _skinny[(programs,)](x, tiles_of_x, tiles_of_weight, tiles_of_out, bias, out, partial, _counters(x.device), m, n, k,
                         tokens, rows, cols, programs, split, stages, gated, bias is not None, aligned,
                         num_warps=warps, **pdl.options(x.device))  # fmt: skip
    return out
