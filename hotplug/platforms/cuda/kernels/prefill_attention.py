"""Causal attention of prompt chunks, a tile of queries a program: over paged NHD caches, or keys gathered from them."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from hotplug.platforms.cuda.kernels import gpu
from hotplug.platforms.cuda.kernels.decode_attention import rows_of
from hotplug.platforms.cuda.kernels.softmax import accumulate, factors, logits, with_sink
from hotplug.vendor import AttentionInputs


class PrefillConfig(NamedTuple):
    """How prompt chunks run."""

    rows: int = 128
    """Queries of a program."""
    keys: int = 64
    warps: int = 8
    stages: int = 3
    tma: bool = False
    """Read whole tiles through tensor descriptors; a tile then lies in one block."""
    overlap: bool = False
    """Begin a tile's first product before the softmax of the tile before it (Shah et al., 2024, section 3.2)."""


def config_for(dim: int, width: int, capability: tuple[int, int]) -> PrefillConfig:
    """The configuration for heads of `dim` elements of `width` bytes."""
    if width == 4:
        return PrefillConfig(rows=16, keys=16, warps=4 if dim <= 128 else 8, stages=2)
    if capability < gpu.HOPPER:  # products need more registers there, and descriptors are not of the hardware
        return PrefillConfig(rows=128 if dim <= 128 else 64, keys=32, stages=2)
    if dim > 128:
        return PrefillConfig(keys=32, stages=2)
    return PrefillConfig(rows=64, warps=4, tma=True)


@triton.jit
def _load(cache, rows, table, origin, tile, floor, length, kv_head, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
          SIZE: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, WINDOWED: tl.constexpr,
          MASKED: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """One tile of keys or values, [KEYS, COLS]; MASKED: zeros before `floor`, where no query of the tile sees anything
    and null entries may be, and from `length` on: cells there may hold anything, and nothing times NaN is NaN."""
    start = tile * KEYS
    position = start + tl.arange(0, KEYS)
    cols = tl.arange(0, COLS)
    inside = position < length
    if WINDOWED:
        inside &= position >= floor
    if TMA:
        row = origin + start if SIZE == 0 else tl.load(table + start // SIZE) * SIZE + start % SIZE
        found = rows.load([row, kv_head * DIM])
        if MASKED:
            found = tl.where(inside[:, None], found, 0.0)
    else:
        if SIZE % KEYS == 0:
            cell = tl.load(table + start // SIZE).to(tl.int64) * SIZE + position % SIZE
        else:
            cell = tl.load(table + position // SIZE, mask=inside, other=0).to(tl.int64) * SIZE + position % SIZE
        source = cache + ((cell * KV_HEADS + kv_head) * DIM)[:, None] + cols[None, :]
        there = (cols < DIM)[None, :]
        if MASKED:
            there &= inside[:, None]
        found = tl.load(source, mask=there, other=0.0) if MASKED or DIM < COLS else tl.load(source)
    return found


@triton.jit
def _span(query, k_cache, v_cache, k_rows, v_rows, table, origin, place, kv_head, begin, end, floor, length, scale,
          cap, window, best, total, mixed, KV_HEADS: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
          KEYS: tl.constexpr, COLS: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
          TMA: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """The tiles begin .. end-1 of keys; every query sees all of them unless MASKED."""
    keys = tl.arange(0, KEYS)
    if OVERLAP and not MASKED:
        if begin < end:
            key = _load(k_cache, k_rows, table, origin, begin, floor, length, kv_head, KV_HEADS, DIM, SIZE, KEYS, COLS,
                        WINDOWED, False, TMA)  # fmt: skip
            products = tl.dot(query, tl.trans(key), input_precision="ieee")
            for tile in range(begin, end - 1):
                key = _load(k_cache, k_rows, table, origin, tile + 1, floor, length, kv_head, KV_HEADS, DIM, SIZE, KEYS,
                            COLS, WINDOWED, False, TMA)  # fmt: skip
                following = tl.dot(query, tl.trans(key), input_precision="ieee")
                value = _load(v_cache, v_rows, table, origin, tile, floor, length, kv_head, KV_HEADS, DIM, SIZE, KEYS,
                              COLS, WINDOWED, False, TMA)  # fmt: skip
                best, total, mixed = accumulate(logits(products, scale, cap, CAPPED), value, best, total, mixed, False)
                products = following
            value = _load(v_cache, v_rows, table, origin, end - 1, floor, length, kv_head, KV_HEADS, DIM, SIZE, KEYS,
                          COLS, WINDOWED, False, TMA)  # fmt: skip
            best, total, mixed = accumulate(logits(products, scale, cap, CAPPED), value, best, total, mixed, False)
    else:
        for tile in range(begin, end):
            key = _load(k_cache, k_rows, table, origin, tile, floor, length, kv_head, KV_HEADS, DIM, SIZE, KEYS, COLS,
                        WINDOWED, MASKED and not TMA, TMA)  # fmt: skip
            scores = logits(tl.dot(query, tl.trans(key), input_precision="ieee"), scale, cap, CAPPED)
            if MASKED:
                position = tile * KEYS + keys
                visible = (position[None, :] <= place[:, None]) & (position[None, :] > place[:, None] - window)
                scores = tl.where(visible, scores, float("-inf"))
            value = _load(v_cache, v_rows, table, origin, tile, floor, length, kv_head, KV_HEADS, DIM, SIZE, KEYS, COLS,
                          WINDOWED, MASKED, TMA)  # fmt: skip
            best, total, mixed = accumulate(scores, value, best, total, mixed, MASKED)
    return best, total, mixed


@triton.jit(do_not_specialize=["first_request", "window", "table_stride"])
def _prefill(q, k_cache, v_cache, k_rows, v_rows, out, block_table, query_start, key_start, seq_lens, sinks, scale, cap,
             window, q_token, q_head, out_token, out_head, table_stride, first_request, KV_HEADS: tl.constexpr,
             GROUP: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
             COLS: tl.constexpr, WINDOWED: tl.constexpr, SINKS: tl.constexpr, CAPPED: tl.constexpr, TMA: tl.constexpr,
             OVERLAP: tl.constexpr):  # fmt: skip
    """A program a query head, tile of one request's queries and request; programs past its queries end at once.

    The tiles with the most keys begin first. SIZE 0: keys are gathered, those of request i from row `key_start[i]` on.
    """
    head, index = tl.program_id(0), tl.program_id(2)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    request = index + first_request
    begin = tl.load(query_start + request).to(tl.int64)
    queries = (tl.load(query_start + request + 1) - begin).to(tl.int32)
    if tile * ROWS >= queries:
        return
    length = tl.load(seq_lens + request).to(tl.int32)
    origin = 0
    if SIZE == 0:
        origin = tl.load(key_start + index).to(tl.int32)
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    row = tile * ROWS + rows
    place = length - queries + row  # positions of the queries
    own = (row < queries)[:, None] & (cols < DIM)[None, :]
    query = tl.load(q + (begin + row)[:, None] * q_token + head * q_head + cols[None, :], mask=own, other=0.0)
    kv_head = head // GROUP
    table = block_table + request * table_stride
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, COLS], tl.float32)
    before = length - queries + tile * ROWS  # position of the tile's first query
    floor = before - window + 1
    last = tl.cdiv(tl.minimum(before + ROWS, length), KEYS)
    if WINDOWED:
        middle = tl.maximum(floor, 0) // KEYS
    else:
        middle = tl.maximum(before + 1, 0) // KEYS
        best, total, mixed = _span(
            query, k_cache, v_cache, k_rows, v_rows, table, origin, place, kv_head, 0, middle, floor, length, scale,
            cap, window, best, total, mixed, KV_HEADS, DIM, SIZE, KEYS, COLS, WINDOWED, False, CAPPED, TMA, OVERLAP,
        )  # fmt: skip
    best, total, mixed = _span(
        query, k_cache, v_cache, k_rows, v_rows, table, origin, place, kv_head, middle, last, floor, length, scale,
        cap, window, best, total, mixed, KV_HEADS, DIM, SIZE, KEYS, COLS, WINDOWED, True, CAPPED, TMA, False,
    )  # fmt: skip
    if SINKS:
        best, total, mixed = with_sink(best, total, mixed, tl.load(sinks + head).to(tl.float32) * 1.4426950408889634)
    result = mixed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + (begin + row)[:, None] * out_token + head * out_head + cols[None, :], result, mask=own)


def prefill(q: Tensor, k: Tensor, v: Tensor, step: AttentionInputs, out: Tensor, scale: float, window: int | None,
            sinks: Tensor | None, soft_cap: float | None, key_start: Tensor | None = None,
            config: PrefillConfig | None = None) -> None:  # fmt: skip
    """Every request after the decodes; q and out hold all tokens of the step.

    k, v: the caches [num_blocks, block_size, kv_heads, head_dim], or with `key_start` [requests + 1] the keys and
    values of these requests one after another, [tokens, kv_heads, head_dim]; `config` then reads by descriptors.
    """
    requests, (_, heads, dim) = len(step.seq_lens) - step.num_decodes, q.shape
    size, kv_heads = 0 if key_start is not None else k.shape[1], k.shape[-2]
    config = config or config_for(dim, q.element_size(), gpu.capability(q.device))
    cols = max(triton.next_power_of_2(dim), 16)
    tma = config.tma and cols == dim and size % config.keys == 0
    if not tma and key_start is not None:
        raise ValueError("gathered keys are read by descriptors only")
    scale, cap = factors(scale, soft_cap)
    _prefill[(heads, triton.cdiv(step.max_query_len, config.rows), requests)](
        q, k, v, *(rows_of(x, config.keys) if tma else x for x in (k, v)), out, step.block_table, step.query_start,
        step.query_start if key_start is None else key_start, step.seq_lens, q if sinks is None else sinks, scale, cap,
        window or 1 << 30, q.stride(0), q.stride(1), out.stride(0), out.stride(1), step.block_table.stride(0),
        step.num_decodes, kv_heads, heads // kv_heads, dim, size, ROWS=config.rows, KEYS=config.keys, COLS=cols,
        WINDOWED=window is not None, SINKS=sinks is not None, CAPPED=soft_cap is not None, TMA=tma,
        OVERLAP=config.overlap, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
