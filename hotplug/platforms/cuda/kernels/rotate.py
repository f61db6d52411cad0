"""Rotation of queries and keys, with their norms if the model has them, and the cache write, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hotplug.platforms.cuda.kernels import pdl
from hotplug.platforms.cuda.kernels.softmax import finite_cells

_HEADS = 16
"""Heads of one token that a program takes."""


@triton.jit
def _rotated(source, weight, position, cos_sin, mask, cols, eps, HALF: tl.constexpr, NORM: tl.constexpr):
    """Heads [HEADS, 2 * HALF] at `source` [HEADS, COLS], normalized if NORM, rotated: both halves, in float32.

    The heads are asked for before the position is there that says by which row of `cos_sin` to rotate them.
    """
    first, second = tl.load(source, mask=mask, other=0.0), tl.load(source + HALF, mask=mask, other=0.0)
    table = cos_sin + tl.load(position).to(tl.int64) * (2 * HALF)
    cos = tl.load(table + cols, mask=cols < HALF, other=0.0)[None, :]
    sin = tl.load(table + HALF + cols, mask=cols < HALF, other=0.0)[None, :]
    if NORM:
        dtype: tl.constexpr = first.dtype
        wide, wide2 = first.to(tl.float32), second.to(tl.float32)
        scale = tl.rsqrt((tl.sum(wide * wide, 1) + tl.sum(wide2 * wide2, 1)) / (2 * HALF) + eps)[:, None]
        there = (cols < HALF)[None, :]
        by, by2 = (tl.load(weight + cols[None, :], mask=there, other=0.0).to(tl.float32),
                   tl.load(weight + HALF + cols[None, :], mask=there, other=0.0).to(tl.float32))  # fmt: skip
        first = ((wide * scale).to(dtype).to(tl.float32) * by).to(dtype)  # rounded where the separate ops round
        second = ((wide2 * scale).to(dtype).to(tl.float32) * by2).to(dtype)
    first, second = first.to(tl.float32), second.to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit(do_not_specialize=["q_token", "k_token", "v_token"])
def _rope_kv_write(q, k, v, q_weight, k_weight, q_out, k_cache, v_cache, positions, slots, cos_sin, eps, q_token,
                   k_token, v_token, q_head, k_head, v_head, heads: tl.constexpr, kv_heads: tl.constexpr,
                   HALF: tl.constexpr, HEADS: tl.constexpr, COLS: tl.constexpr, NORM: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    """A program a token and HEADS of its heads: those of queries, then of keys, then of values (`finite_cells`)."""
    pdl.release(PDL)
    pdl.wait(PDL)
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim: tl.constexpr = 2 * HALF
    q_parts: tl.constexpr = triton.cdiv(heads, HEADS)
    kv_parts: tl.constexpr = triton.cdiv(kv_heads, HEADS)
    cols = tl.arange(0, COLS)
    if part < q_parts:
        head = part * HEADS + tl.arange(0, HEADS)
        mask = (head < heads)[:, None] & (cols < HALF)[None, :]
        source = q + token * q_token + head[:, None] * q_head + cols[None, :]
        first, second = _rotated(source, q_weight, positions + token, cos_sin, mask, cols, eps, HALF, NORM)
        target = q_out + token * (heads * dim) + head[:, None] * dim + cols[None, :]
        tl.store(target, first, mask=mask)
        tl.store(target + HALF, second, mask=mask)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        part -= q_parts
        head = (part % kv_parts) * HEADS + tl.arange(0, HEADS)
        mask = (head < kv_heads)[:, None] & (cols < HALF)[None, :]
        place = slot * (kv_heads * dim) + head[:, None] * dim + cols[None, :]
        values = v + token * v_token + head[:, None] * v_head + cols[None, :]
        value, value2 = tl.load(values, mask=mask, other=0.0), tl.load(values + HALF, mask=mask, other=0.0)
        if part < kv_parts:
            source = k + token * k_token + head[:, None] * k_head + cols[None, :]
            first, second = _rotated(source, k_weight, positions + token, cos_sin, mask, cols, eps, HALF, NORM)
            first, _ = finite_cells(first, value)
            second, _ = finite_cells(second, value2)
            tl.store(k_cache + place, first, mask=mask)
            tl.store(k_cache + place + HALF, second, mask=mask)
        else:
            _, stored = finite_cells(value, value)
            _, stored2 = finite_cells(value2, value2)
            tl.store(v_cache + place, stored, mask=mask)
            tl.store(v_cache + place + HALF, stored2, mask=mask)


def _launch(q: Tensor, k: Tensor, v: Tensor, norms: tuple[Tensor, Tensor, float] | None, positions: Tensor,
            cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> Tensor:  # fmt: skip
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if tokens:
        q_weight, k_weight, eps = norms or (q, k, 0.0)
        parts = triton.cdiv(heads, _HEADS) + 2 * triton.cdiv(kv_heads, _HEADS)
        _rope_kv_write[(tokens, parts)](
            q, k, v, q_weight, k_weight, out, k_cache, v_cache, positions, slots, cos_sin, eps, q.stride(0),
            k.stride(0), v.stride(0), q.stride(1), k.stride(1), v.stride(1), heads, kv_heads, dim // 2, _HEADS,
            max(triton.next_power_of_2(dim // 2), 16), norms is not None, num_warps=4, **pdl.options(q.device),
        )  # fmt: skip
    return out


def rope_kv_write(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, k_cache: Tensor,
                  v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Heads dense in their last dimension, whole heads rotated, caches of the compute dtype in NHD."""
    return _launch(q, k, v, None, positions, cos_sin, k_cache, v_cache, slots), k_cache, v_cache


def qk_norm_rope_kv_write(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, positions: Tensor,
                          cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
                          eps: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`rope_kv_write` of normalized queries and keys."""
    out = _launch(q, k, v, (q_weight, k_weight, eps), positions, cos_sin, k_cache, v_cache, slots)
    return out, k_cache, v_cache
