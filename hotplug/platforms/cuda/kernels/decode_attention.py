"""Attention of one query a request over paged NHD caches, each context split over several programs.

The last program of a request and key/value head merges the parts (FlashDecoding, Dao et al., 2023, in one launch). How
many parts a context has is decided on the device, from its length; the grid only bounds it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hotplug.platforms.cuda.kernels import gpu, pdl
from hotplug.platforms.cuda.kernels.softmax import accumulate, factors, logits, with_sink
from hotplug.vendor import AttentionInputs

release, wait = pdl.release, pdl.wait
MAX_SPLITS = 64
FEW_PAIRS = 64
"""Pairs of request and key/value head that do not fill a device."""
COUNTERS = 1 << 14
"""Pairs of request and key/value head whose contexts may be split; a counter each. More pairs fill any device."""


class DecodeConfig(NamedTuple):
    """How decodes run. Every tile of `keys` positions is read whole before its products."""

    keys: int = 64
    warps: int = 4
    stages: int = 3
    programs: int = 2
    """Programs a multiprocessor that the grid aims at: contexts are split to reach it."""
    least: int = 1
    """Tiles that a part has at least."""
    tma: bool = False
    """Read whole tiles through tensor descriptors; a tile then lies in one block."""


def config_for(pairs: int, dim: int, width: int, capability: tuple[int, int]) -> DecodeConfig:
    """The configuration for `pairs` of request and key/value head; `width` is the bytes of an element."""
    if capability == (0, 0) and width < 4:  # AMD: 64 KiB hold what is on its way
        return DecodeConfig(keys=32, stages=2)
    if width == 4:
        return DecodeConfig(keys=16, warps=4 if dim <= 128 else 8, stages=2)
    if dim > 128:
        return DecodeConfig(keys=32, stages=5)
    if pairs <= FEW_PAIRS:  # short contexts are not worth splitting
        return DecodeConfig(stages=5, least=4)
    if dim <= 64:
        return DecodeConfig(stages=7, programs=4)
    if pairs > 1024:
        return DecodeConfig(stages=6)
    if pairs > 512:
        return DecodeConfig(warps=2)
    return DecodeConfig(stages=7) if pairs <= 256 else DecodeConfig(keys=32, warps=2, stages=7)


@triton.jit(do_not_specialize=["splits", "least", "window", "table_stride"])
def _decode(q, k_cache, v_cache, k_rows, v_rows, block_table, seq_lens, sinks, out, partial, sums, arrived, scale, cap,
            window, q_token, q_head, out_token, out_head, table_stride, splits, least, KV_HEADS: tl.constexpr,
            GROUP: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
            COLS: tl.constexpr, PARTS: tl.constexpr, SINKS: tl.constexpr, CAPPED: tl.constexpr, TMA: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """A program a key/value head, part of the context and request; the group's heads are the rows of a tile.

    PARTS: a power of two from `splits`; 1 where contexts are not split. `partial` [requests, KV_HEADS, splits, GROUP,
    DIM] takes the normalized result of each part, `sums` the logarithms (base 2) of their softmax sums, and `arrived`
    counts them; it is zero before and after.
    """
    head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    release(PDL)
    wait(PDL)
    rows, keys, cols = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, COLS)
    seen = (rows < GROUP)[:, None] & (cols < DIM)[None, :]
    length = tl.load(seq_lens + request)
    query = tl.load(q + request * q_token + (head * GROUP + rows)[:, None] * q_head + cols[None, :], mask=seen,
                    other=0.0)  # fmt: skip
    first = tl.maximum(length - window, 0) // KEYS
    tiles = tl.cdiv(length, KEYS) - first
    share = tl.maximum(tl.cdiv(tiles, splits), least)
    used = tl.maximum(tl.cdiv(tiles, share), 1)
    if split >= used:
        return
    begin = first + split * share
    end = tl.minimum(begin + share, first + tiles)
    table = block_table + request * table_stride
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, COLS], tl.float32)
    masked = begin
    if TMA:  # tiles that end within the context; what lies past its end may be anything, so it must not be loaded
        masked = tl.maximum(tl.minimum(end, length // KEYS), begin)
        for tile in range(begin, masked):
            start = tile * KEYS
            row = tl.load(table + start // SIZE) * SIZE + start % SIZE
            key = k_rows.load([row, head * DIM])
            scores = logits(tl.dot(query, tl.trans(key), input_precision="ieee"), scale, cap, CAPPED)
            scores = tl.where((start + keys >= length - window)[None, :], scores, float("-inf"))
            value = v_rows.load([row, head * DIM])
            value = tl.where((start + keys >= length - window)[:, None], value, 0.0)  # null entries may be behind it
            best, total, mixed = accumulate(scores, value, best, total, mixed, False)
    for tile in range(masked, end):
        position = tile * KEYS + keys
        visible = (position < length) & (position >= length - window)
        if SIZE % KEYS == 0:
            start = tile * KEYS
            block = tl.load(table + start // SIZE).to(tl.int64)
            cell = ((block * SIZE + start % SIZE + keys) * KV_HEADS + head) * DIM
        else:
            block = tl.load(table + position // SIZE, mask=visible, other=0).to(tl.int64)
            cell = ((block * SIZE + position % SIZE) * KV_HEADS + head) * DIM
        there = visible[:, None] if DIM == COLS else visible[:, None] & (cols < DIM)[None, :]
        key = tl.load(k_cache + cell[:, None] + cols[None, :], mask=there, other=0.0)
        scores = logits(tl.dot(query, tl.trans(key), input_precision="ieee"), scale, cap, CAPPED)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        value = tl.load(v_cache + cell[:, None] + cols[None, :], mask=there, other=0.0)
        best, total, mixed = accumulate(scores, value, best, total, mixed, False)
    target = out + request * out_token + (head * GROUP + rows)[:, None] * out_head + cols[None, :]
    sink = tl.full([ROWS], float("-inf"), tl.float32)
    if SINKS:
        sink = tl.load(sinks + head * GROUP + rows, mask=rows < GROUP, other=0.0).to(tl.float32) * 1.4426950408889634
    if PARTS == 1:
        _finish(target, best, total, mixed, sink, seen, SINKS)
    else:
        if used == 1:
            _finish(target, best, total, mixed, sink, seen, SINKS)
        else:
            pair = request * KV_HEADS + head
            place = ((pair * splits + split) * GROUP + rows)[:, None] * DIM + cols[None, :]
            tl.store(partial + place, mixed / total[:, None], mask=seen)
            tl.store(sums + (pair * splits + split) * GROUP + rows, best + tl.log2(total), mask=rows < GROUP)
            tl.debug_barrier()  # every thread's part is written before the one that counts says so
            if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == used - 1:
                tl.store(arrived + pair, 0)
                _merge(partial, sums, sinks, out + request * out_token, pair * splits, used, head, out_head, GROUP, DIM,
                       PARTS, COLS, SINKS)  # fmt: skip


@triton.jit
def _finish(target, best, total, mixed, sink, seen, SINKS: tl.constexpr):
    """Write the tile of a context that was not split."""
    if SINKS:
        best, total, mixed = with_sink(best, total, mixed, sink)
    result = mixed / tl.where(total > 0, total, 1.0)[:, None]  # a request of no length has zeros
    tl.store(target, result, mask=seen)


@triton.jit
def _merge(partial, sums, sinks, out, first, used, head, out_head, GROUP: tl.constexpr, DIM: tl.constexpr,
           PARTS: tl.constexpr, COLS: tl.constexpr, SINKS: tl.constexpr):  # fmt: skip
    """The `used` parts from `first` on, weighted by their softmax sums, one query head after another.

    Other programs wrote them, so they are read past the first-level cache.
    """
    parts, cols = tl.arange(0, PARTS), tl.arange(0, COLS)
    for member in range(GROUP):
        row = (first + parts) * GROUP + member
        log = tl.load(sums + row, mask=parts < used, other=float("-inf"), cache_modifier=".cg")
        there = (parts < used)[:, None] & (cols < DIM)[None, :]
        values = tl.load(partial + row[:, None] * DIM + cols[None, :], mask=there, other=0.0, cache_modifier=".cg")
        top = tl.max(log, 0)
        weights = tl.exp2(log - top)
        total = tl.sum(weights, 0)
        if SINKS:
            total += tl.exp2(tl.load(sinks + head * GROUP + member).to(tl.float32) * 1.4426950408889634 - top)
        mixed = tl.sum(values * weights[:, None], 0) / total
        tl.store(out + (head * GROUP + member) * out_head + cols, mixed, mask=cols < DIM)


def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, out: Tensor, scale: float,
           window: int | None, sinks: Tensor | None, soft_cap: float | None,
           config: DecodeConfig | None = None) -> None:  # fmt: skip
    """The first len(q) requests of a step: q and out [requests, heads, head_dim], caches of their dtype."""
    requests, heads, dim = q.shape
    size, kv_heads = k_cache.shape[1:3]
    group, context, pairs = heads // kv_heads, step.block_table.shape[1] * size, requests * kv_heads
    config = config or config_for(pairs, dim, q.element_size(), gpu.capability(q.device))
    splits = split_count(pairs, context, config, gpu.multiprocessors(q.device))
    partial = torch.empty((pairs * splits * group, dim) if splits > 1 else 0, dtype=torch.float32, device=q.device)
    sums = torch.empty(pairs * splits * group if splits > 1 else 0, dtype=torch.float32, device=q.device)
    cols = max(triton.next_power_of_2(dim), 16)
    tma = config.tma and size % config.keys == 0 and cols == dim
    scale, cap = factors(scale, soft_cap)
    _decode[(kv_heads, splits, requests)](
        q, k_cache, v_cache, *(rows_of(c, config.keys) if tma else c for c in (k_cache, v_cache)), step.block_table,
        step.seq_lens, q if sinks is None else sinks, out, partial, sums, counters(q.device), scale, cap,
        window or 1 << 30, q.stride(0), q.stride(1), out.stride(0), out.stride(1), step.block_table.stride(0), splits,
        config.least, kv_heads, group, dim, size, ROWS=max(triton.next_power_of_2(group), 16), KEYS=config.keys,
        COLS=cols, PARTS=1 if splits == 1 else max(triton.next_power_of_2(splits), 8), SINKS=sinks is not None,
        CAPPED=soft_cap is not None, TMA=tma, num_warps=config.warps, num_stages=config.stages,
        **pdl.options(q.device),
    )  # fmt: skip


def split_count(pairs: int, context: int, config: DecodeConfig, processors: int) -> int:
    """Parts that a context has at most, so that `pairs` of request and head come to the programs aimed at."""
    if pairs > COUNTERS:
        return 1
    return max(min(processors * config.programs // pairs, triton.cdiv(context, config.keys * config.least),
                   MAX_SPLITS), 1)  # fmt: skip


def rows_of(cache: Tensor, keys: int) -> Any:
    """Tiles of `keys` cells and one head of a cache [num_blocks, block_size, kv_heads, head_dim], by tensor descriptor.

    Or of keys gathered from one, [tokens, kv_heads, head_dim].
    """
    dim = cache.shape[-1]
    flat = cache.view(-1, cache.shape[-2] * dim)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [keys, dim])


_counters: dict[torch.device, Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """Zeros [COUNTERS] that every call leaves zero, so one launch after another on a stream may use them.

    Made by the first call, which must not be one that is being captured: a captured fill would not run.
    """
    if device not in _counters:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the first decode on a device must run before one is captured")
        _counters[device] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _counters[device]
