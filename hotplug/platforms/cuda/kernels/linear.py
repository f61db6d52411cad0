"""Linear layers of few rows, where reading the weight is all of the work: one row by dot products, up to 64 by
matrix instructions with the weight as their left side. Both with the gating of SwiGLU if asked for.

Many rows are cuBLAS's business (`torch.nn.functional.linear`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hotplug.platforms.cuda.kernels import pdl

MOST_ROWS = 64
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
    more = N.to(tl.int64) * K  # from gate to up
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
def _skinny(x, weight, bias, out, partial, counters, M, N, x_stride, K: tl.constexpr, TOKENS: tl.constexpr,
            ROWS: tl.constexpr, COLS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
            GATED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program ROWS outputs of all M <= TOKENS rows of x, over one of SPLITS parts of K.

    Of the programs of a tile the last one to end sums their parts, in order, so that the result is always the same.
    """
    pdl.release(PDL)
    tile, split = tl.program_id(0), tl.program_id(1)
    rows, tokens, cols = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS), tl.arange(0, COLS)
    there, here = (rows < N)[:, None], (tokens < M)[None, :]
    share: tl.constexpr = triton.cdiv(triton.cdiv(K, COLS), SPLITS) * COLS
    source = weight + rows[:, None].to(tl.int64) * K + cols[None, :]
    more = N.to(tl.int64) * K  # from gate to up
    pdl.wait(PDL)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    total_up = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in tl.range(0, share, COLS, num_stages=STAGES):
        start = split * share + step
        mask, inside = there, here
        if not EVEN:
            mask, inside = there & (start + cols < K)[None, :], here & (start + cols < K)[:, None]
        value = tl.load(source + start, mask=mask, other=0.0)
        vectors = tl.load(x + tokens[None, :] * x_stride + (start + cols)[:, None], mask=inside, other=0.0)
        total = tl.dot(value, vectors, total, input_precision=PRECISION)
        if GATED:
            value_up = tl.load(source + more + start, mask=mask, other=0.0)
            total_up = tl.dot(value_up, vectors, total_up, input_precision=PRECISION)
    last = True
    if SPLITS > 1:
        cells = tl.arange(0, ROWS)[:, None] * TOKENS + tokens[None, :]
        size: tl.constexpr = ROWS * TOKENS
        parts = partial + tile.to(tl.int64) * (SPLITS * size * (2 if GATED else 1))
        tl.store(parts + split * size + cells, total)
        if GATED:
            tl.store(parts + (SPLITS + split) * size + cells, total_up)
        tl.debug_barrier()  # every thread's part is written before it is counted
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.store(counters + tile, 0)
            total = tl.zeros([ROWS, TOKENS], tl.float32)
            total_up = tl.zeros([ROWS, TOKENS], tl.float32)
            for i in tl.range(0, SPLITS, num_stages=1):
                total += tl.load(parts + i * size + cells, cache_modifier=".cg")
                if GATED:
                    total_up += tl.load(parts + (SPLITS + i) * size + cells, cache_modifier=".cg")
    if last:
        if BIAS:
            total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
        target = out + tokens[None, :].to(tl.int64) * N + rows[:, None]
        if GATED:
            if BIAS:
                total_up += tl.load(bias + N + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
            tl.store(target, _gate(total, total_up, x.dtype.element_ty), mask=there & here)
        else:
            tl.store(target, total, mask=there & here)


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
           splits: int, stages: int, warps: int) -> Tensor:  # fmt: skip
    """`x` [M <= 64, K] times `weight` [N or 2N, K] transposed, gated if asked; [M, N] of `dtype`."""
    m, k = x.shape
    n = weight.shape[0] // (2 if gated else 1)
    tokens = max(triton.next_power_of_2(m), 16)
    tiles = triton.cdiv(n, rows)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    partial: Any = out
    if splits > 1:
        partial = torch.empty(
            tiles * splits * rows * tokens * (2 if gated else 1), dtype=torch.float32, device=x.device
        )
    precision = "ieee" if x.dtype is torch.float32 else "tf32"
    _skinny[(tiles, splits)](x, weight, bias, out, partial, _counters(x.device), m, n, x.stride(0), k, tokens, rows,
                             cols, splits, stages, k % (cols * splits) == 0, gated, bias is not None, precision,
                             num_warps=warps, **pdl.options(x.device))  # fmt: skip
    return out


def _few(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, gated: bool) -> Tensor:
    if x.shape[0] == 1:
        return gemv(x, weight, bias, gated=gated, dtype=dtype, rows=2 if gated else 4, cols=1024, warps=4)
    return skinny(x, weight, bias, gated=gated, dtype=dtype, rows=64, cols=128, splits=1 if gated else 2, stages=4,
                  warps=4)  # fmt: skip


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The op `linear`, for few rows."""
    return _few(x, weight, bias, x.dtype, gated=False)


def linear_silu_mul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The op `linear_silu_mul`, for few rows."""
    return _few(x, weight, bias, x.dtype, gated=True)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The op `logits`, for few rows: float32 at once."""
    return _few(hidden, weight, bias, torch.float32, gated=False)
