"""Paged attention over NHD caches: cache writes, decodes split over the context, and tiles of prompt chunks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hotplug.vendor import AttentionInputs

LOG2E = 1.4426950408889634


@triton.jit
def _kv_write(k, v, k_cache, v_cache, slots, k_token, k_head, v_token, v_head, dim, width, BLOCK: tl.constexpr):
    """A program a token: its keys and values, [kv_heads, dim] each, go to consecutive cells."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    cells = tl.arange(0, BLOCK)
    mask = cells < width
    head, col = cells // dim, cells % dim
    tl.store(k_cache + slot * width + cells, tl.load(k + token * k_token + head * k_head + col, mask=mask), mask=mask)
    tl.store(v_cache + slot * width + cells, tl.load(v + token * v_token + head * v_head + col, mask=mask), mask=mask)


def kv_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, layout: str
) -> tuple[Tensor, Tensor]:
    """Caches of the compute dtype, in place."""
    tokens, heads, dim = k.shape
    if tokens:
        _kv_write[(tokens,)](k, v, k_cache, v_cache, slots, k.stride(0), k.stride(1), v.stride(0), v.stride(1), dim,
                             heads * dim, BLOCK=triton.next_power_of_2(heads * dim), num_warps=4)  # fmt: skip
    return k_cache, v_cache


@triton.jit
def _decode(q, k_cache, v_cache, block_table, seq_lens, partial, sums, scale, window, q_token, q_head, table_stride,
            splits, kv_heads: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
            ROWS: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A program a request, key/value head and part of the context; the group's heads are the rows of a tile.

    Leaves the part's mixed values, normalized, and the logarithm (base 2) of its softmax sum.
    """
    request, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(seq_lens + request)
    first = tl.maximum(length - window, 0) // KEYS * KEYS
    share = tl.cdiv(tl.cdiv(length - first, KEYS), splits) * KEYS
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    rows, keys, cols = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, COLS)
    seen = (rows < GROUP)[:, None] & (cols < DIM)[None, :]
    source = q + request * q_token + (head * GROUP + rows)[:, None] * q_head + cols[None, :]
    query = tl.load(source, mask=seen, other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(begin, end, KEYS):
        position = start + keys
        inside = position < end
        block = tl.load(block_table + request * table_stride + position // SIZE, mask=inside, other=0).to(tl.int64)
        cell = ((block * SIZE + position % SIZE) * kv_heads + head) * DIM
        there = inside[:, None] & (cols < DIM)[None, :]
        key = tl.load(k_cache + cell[:, None] + cols[None, :], mask=there, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        visible = inside & (position >= length - window)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new = tl.maximum(best, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - safe[:, None])
        old = tl.exp2(best - safe)
        value = tl.load(v_cache + cell[:, None] + cols[None, :], mask=there, other=0.0)
        mixed = mixed * old[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        total = total * old + tl.sum(weights, 1)
        best = new
    alive = total > 0
    part = (request * kv_heads + head) * splits + split
    place = partial + (part * GROUP + rows)[:, None] * DIM + cols[None, :]
    tl.store(place, mixed / tl.where(alive, total, 1.0)[:, None], mask=seen)
    log = tl.where(alive, best + tl.log2(tl.where(alive, total, 1.0)), float("-inf"))
    tl.store(sums + part * GROUP + rows, log, mask=rows < GROUP)


@triton.jit
def _merge(partial, sums, out, splits, kv_heads: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
           SPLITS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """A program a request and query head: its parts, weighted by their softmax sums."""
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts, cols = tl.arange(0, SPLITS), tl.arange(0, COLS)
    row = ((request * kv_heads + head // GROUP) * splits + parts) * GROUP + head % GROUP
    log = tl.load(sums + row, mask=parts < splits, other=float("-inf"))
    weights = tl.exp2(log - tl.max(log, 0))
    there = (parts < splits)[:, None] & (cols < DIM)[None, :]
    values = tl.load(partial + row[:, None] * DIM + cols[None, :], mask=there, other=0.0)
    mixed = tl.sum(values * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + (request * kv_heads * GROUP + head) * DIM + cols, mixed, mask=cols < DIM)


def _decodes(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, out: Tensor, scale: float,
             window: int | None) -> None:  # fmt: skip
    """One query a request: q and out [requests, heads, head_dim]."""
    requests, heads, dim = q.shape
    size, kv_heads = k_cache.shape[1:3]
    group, context = heads // kv_heads, step.block_table.shape[1] * size
    keys = 64
    splits = split_count(requests * kv_heads, context, keys)
    partial = torch.empty((requests, kv_heads, splits, group, dim), dtype=torch.float32, device=q.device)
    sums = torch.empty((requests, kv_heads, splits, group), dtype=torch.float32, device=q.device)
    cols = max(triton.next_power_of_2(dim), 16)
    _decode[(requests, kv_heads, splits)](
        q, k_cache, v_cache, step.block_table, step.seq_lens, partial, sums, scale * LOG2E, window or 1 << 30,
        q.stride(0), q.stride(1), step.block_table.stride(0), splits, kv_heads, group, dim, size,
        ROWS=max(triton.next_power_of_2(group), 16), KEYS=keys, COLS=cols, PRECISION=_precision(q), num_warps=4,
        num_stages=3,
    )  # fmt: skip
    _merge[(requests, heads)](partial, sums, out, splits, kv_heads, group, dim,
                              SPLITS=triton.next_power_of_2(splits), COLS=cols, num_warps=2)  # fmt: skip


def split_count(pairs: int, context: int, keys: int) -> int:
    """Parts to split a context into, so that `pairs` of request and head fill the device about twice."""
    return max(min(triton.cdiv(context, 4 * keys), triton.cdiv(264, pairs), 64), 1)


@triton.jit
def _prefill(q, k_cache, v_cache, out, block_table, query_start, seq_lens, scale, window, q_token, q_head, out_token,
             out_head, table_stride, first_request, kv_heads: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
             SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """A program a tile of one request's queries and one head; programs past its queries end at once."""
    tile, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2) + first_request
    begin = tl.load(query_start + request).to(tl.int64)
    queries = tl.load(query_start + request + 1) - begin
    if tile * ROWS >= queries:
        return
    length = tl.load(seq_lens + request)
    rows, keys, cols = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, COLS)
    row = tile * ROWS + rows
    place = length - queries + row  # positions of the queries
    own = (row < queries)[:, None] & (cols < DIM)[None, :]
    query = tl.load(q + (begin + row)[:, None] * q_token + head * q_head + cols[None, :], mask=own, other=0.0)
    kv_head = head // GROUP
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, COLS], tl.float32)
    last = tl.minimum(length - queries + (tile + 1) * ROWS, length)
    first = tl.maximum(length - queries + tile * ROWS - window + 1, 0) // KEYS * KEYS
    for start in range(first, last, KEYS):
        position = start + keys
        inside = position < length
        block = tl.load(block_table + request * table_stride + position // SIZE, mask=inside, other=0).to(tl.int64)
        cell = ((block * SIZE + position % SIZE) * kv_heads + kv_head) * DIM
        there = inside[:, None] & (cols < DIM)[None, :]
        key = tl.load(k_cache + cell[:, None] + cols[None, :], mask=there, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        visible = (position[None, :] <= place[:, None]) & (position[None, :] > place[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        new = tl.maximum(best, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - safe[:, None])
        old = tl.exp2(best - safe)
        value = tl.load(v_cache + cell[:, None] + cols[None, :], mask=there, other=0.0)
        mixed = mixed * old[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        total = total * old + tl.sum(weights, 1)
        best = new
    result = mixed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + (begin + row)[:, None] * out_token + head * out_head + cols[None, :], result, mask=own)


def _chunks(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, out: Tensor, scale: float,
            window: int | None) -> None:  # fmt: skip
    """Every request after the decodes; q and out hold all tokens of the step."""
    requests, (_, heads, dim) = len(step.seq_lens) - step.num_decodes, q.shape
    size, kv_heads = k_cache.shape[1:3]
    rows = 128 if step.max_query_len > 64 and q.element_size() == 2 else 64 if q.element_size() == 2 else 32
    cols = max(triton.next_power_of_2(dim), 16)
    _prefill[(triton.cdiv(step.max_query_len, rows), heads, requests)](
        q, k_cache, v_cache, out, step.block_table, step.query_start, step.seq_lens, scale * LOG2E, window or 1 << 30,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), step.block_table.stride(0), step.num_decodes, kv_heads,
        heads // kv_heads, dim, size, ROWS=rows, KEYS=64 if q.element_size() == 2 else 32, COLS=cols,
        PRECISION=_precision(q), num_warps=8 if rows == 128 else 4, num_stages=3 if q.element_size() == 2 else 2,
    )  # fmt: skip


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, scale: float, window: int | None, layout: str
) -> Tensor:
    """Decodes and prompt chunks, each by its own kernel; lengths are read on the device."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decodes = step.num_decodes
    if decodes:
        _decodes(q[:decodes], k_cache, v_cache, step, out[:decodes], scale, window)
    if decodes < len(step.seq_lens):
        _chunks(q, k_cache, v_cache, step, out, scale, window)
    return out


def _precision(x: Tensor) -> str:
    """Products of float32 are computed in float32; narrower ones are exact in the tensor cores."""
    return "ieee" if x.dtype is torch.float32 else "tf32"
