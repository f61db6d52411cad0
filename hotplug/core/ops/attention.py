"""Paged attention: writing keys and values into blocks, and attending over a block table.

Keys and values live in `k_cache` and `v_cache`, each [num_blocks, block_size, kv_heads, head_dim] in layout
NHD or [num_blocks, kv_heads, block_size, head_dim] in layout HND. Block 0 is the null block: padding and
entries behind a sliding window point there. All keys and values of a step are written before any query of
the same step reads (`kv_write` precedes `attention` in every layer).

No request's values reach another through a cache, also where some are NaN or infinite. Two rules see to it. What is
stored as a value is finite: `kv_write` marks one that is not by NaN in its key, which whoever sees it finds in its
scores. And what a query does not see is left out, not multiplied by zero or added to minus infinity, since 0 * NaN is
NaN: cells past a sequence's end, of other blocks and of the null block may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar, cast

import torch
from torch import Tensor

from hotplug.core.ops.registry import Bucket, Op

P = ParamSpec("P")
Made = TypeVar("Made")


@dataclass(slots=True)
class AttentionInputs:
    """Where the queries of a step sit and what each may see. R requests, decodes (one query) first."""

    block_table: Tensor
    """[R, max_blocks] block ids in order of position."""
    query_start: Tensor
    """[R + 1] index of each request's first query among the step's tokens."""
    seq_lens: Tensor
    """[R] tokens in the cache once this step is written; the last query sits at position seq_len - 1."""
    query_lens_host: list[int] | None
    """`query_start` as differences, on the host, for kernels that loop; None in a step of static shape."""
    seq_lens_host: list[int] | None
    num_decodes: int
    max_query_len: int
    """The longest run of queries; in a step of static shape 1 for decodes, else the number of tokens."""
    max_seq_len: int
    _made: dict[tuple[Any, ...], object] = field(default_factory=dict, init=False, repr=False, compare=False)

    NODE_FIELDS: ClassVar[tuple[str, ...]] = ("block_table", "query_start", "seq_lens", "max_query_len")
    """What an attention node of a whole-step program has of this: a step of static shape (`core.ops.program`)."""

    @classmethod
    def from_node(cls, block_table: Tensor, query_start: Tensor, seq_lens: Tensor, max_query_len: int) -> Self:
        """The inputs of a step of static shape."""
        decodes = len(seq_lens) if max_query_len == 1 else 0
        return cls(block_table, query_start, seq_lens, None, None, decodes, max_query_len, max_seq_len=0)

    def once(self, make: Callable[Concatenate[Self, P], Made], *args: P.args, **kwargs: P.kwargs) -> Made:
        """`make(self, *args)`, made at its first call with these arguments and kept for the step's other layers.

        For what an attention kernel prepares of a step: `make` is a function of the kernel's module, so that each
        kernel has what it made itself. Layers of one KV group share these inputs. Arguments are hashable.
        """
        key = (make, args, *kwargs.items())
        try:
            found = self._made[key]
        except KeyError:
            found = self._made[key] = make(self, *args, **kwargs)
        return cast("Made", found)


def kv_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, layout: str
) -> tuple[Tensor, Tensor]:
    """Store `k`, `v` [num_tokens, kv_heads, head_dim] at `slots` [num_tokens] (block * block_size + offset).

    In place on the caches, which are in `layout` and may have another dtype; what a narrower one cannot hold
    becomes its largest value. Where an element of `v` is NaN or infinite, 0 is stored and NaN for the element of `k`
    in the same place (`finite_values`). Returns the caches that hold them, which are the ones given. Only in programs
    that are compiled as a whole are they others (`functional_kv_write`).
    """
    for x, cache in zip(finite_values(k, v), (k_cache, v_cache), strict=True):
        cache[_cells(cache, slots, layout)] = _narrow(x, cache.dtype)
    return k_cache, v_cache


def functional_kv_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, layout: str
) -> tuple[Tensor, Tensor]:
    """`kv_write` that leaves the caches alone and returns new ones."""
    k, v = finite_values(k, v)
    k_cache = k_cache.index_put(_cells(k_cache, slots, layout), _narrow(k, k_cache.dtype))
    return k_cache, v_cache.index_put(_cells(v_cache, slots, layout), _narrow(v, v_cache.dtype))


def finite_values(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`k` and `v` of one shape as they are stored: elements of `v` that are not finite are 0, and NaN in `k`.

    Queries that see such a key get NaN, and no other query does: a weight of zero times a finite value is zero.
    """
    lost = ~v.isfinite()
    return k.masked_fill(lost, float("nan")), v.masked_fill(lost, 0.0)


def _cells(cache: Tensor, slots: Tensor, layout: str) -> tuple[Tensor, ...]:
    """The index of `slots` in a cache, one [kv_heads, head_dim] each."""
    if layout == "NHD":
        return slots // cache.shape[1], slots % cache.shape[1]
    heads = torch.arange(cache.shape[1], device=cache.device, dtype=slots.dtype)
    slots = slots.unsqueeze(1)
    return slots // cache.shape[2], heads, slots % cache.shape[2]


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, saturated where `dtype` reaches less far."""
    largest = torch.finfo(dtype).max
    if largest < torch.finfo(x.dtype).max:
        x = x.clamp(-largest, largest)
    return x.to(dtype)


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    step: AttentionInputs,
    scale: float,
    window: int | None,
    layout: str,
    sinks: Tensor | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Causal attention of `q` [num_tokens, heads, head_dim] over each request's blocks; same shape and dtype.

    `window` w lets a query at position p see p-w+1 .. p. Softmax in float32. Heads share key/value heads in
    consecutive groups (grouped-query attention, Ainslie et al., 2023). What a query does not see has no effect on it,
    whatever the cells hold; a query that sees a key with NaN has a result of NaN. `sinks` [heads], of any floating
    dtype, are logits that take part in each softmax's sum and have no value (gpt-oss, OpenAI, 2025). `soft_cap` c
    makes a score s, scaled, c * tanh(s / c) (Gemma 2, 2024).
    """
    if step.query_lens_host is None or step.seq_lens_host is None:
        return _attend_static(q, k_cache, v_cache, step, scale, window, layout, sinks, soft_cap)
    out = torch.empty_like(q)
    begin = 0
    for i, (query_len, seq_len) in enumerate(zip(step.query_lens_host, step.seq_lens_host, strict=True)):
        end = begin + query_len
        k, v = gather_kv(k_cache, v_cache, step.block_table[i], seq_len, layout)
        out[begin:end] = _attend(q[begin:end], k, v, scale, window, sinks, soft_cap)
        begin = end
    return out


def gather_kv(
    k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_len: int, layout: str
) -> tuple[Tensor, Tensor]:
    """Keys and values of one request in order of position, each [seq_len, kv_heads, head_dim]."""
    block_size = k_cache.shape[1] if layout == "NHD" else k_cache.shape[2]
    blocks = block_table[: -(-seq_len // block_size)]
    k, v = k_cache[blocks], v_cache[blocks]
    if layout == "HND":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    return k.flatten(0, 1)[:seq_len], v.flatten(0, 1)[:seq_len]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: Tensor | None, soft_cap: float | None
) -> Tensor:
    """Attention of the last len(q) positions of one sequence over all of it."""
    query_len, heads, head_dim = q.shape
    seq_len, kv_heads, _ = k.shape
    grouped = q.reshape(query_len, kv_heads, heads // kv_heads, head_dim).to(torch.float32)
    scores = _capped(torch.einsum("qhgd,khd->hgqk", grouped, k.to(torch.float32)) * scale, soft_cap)
    key = torch.arange(seq_len, device=q.device)
    query = torch.arange(seq_len - query_len, seq_len, device=q.device).unsqueeze(1)
    visible = key <= query
    if window is not None:
        visible &= key > query - window
        v = v.to(torch.float32).masked_fill(~visible.any(0)[:, None, None], 0.0)  # behind the window are null entries
    sinks = None if sinks is None else sinks.view(kv_heads, -1, 1)
    weights = _softmax(scores.masked_fill(~visible, float("-inf")), sinks)
    mixed = torch.einsum("hgqk,khd->qhgd", weights, v.to(torch.float32))
    return mixed.reshape(query_len, heads, head_dim).to(q.dtype)


def _capped(scores: Tensor, soft_cap: float | None) -> Tensor:
    return scores if soft_cap is None else soft_cap * (scores / soft_cap).tanh()


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the last dimension; `sinks`, broadcast over the others, adds to the sum."""
    if sinks is None:
        return scores.softmax(-1)
    sinks = sinks.to(torch.float32).expand(scores.shape[:-1]).unsqueeze(-1)
    return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]


def _attend_static(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, scale: float, window: int | None, layout: str,
    sinks: Tensor | None, soft_cap: float | None,
) -> Tensor:  # fmt: skip
    """`attention` with no length read on the host: every query meets every key of its step, masked.

    So it can be recorded and replayed. Tokens past the last request are padding; they see position 0 at least,
    since a softmax over nothing is NaN and would reach the null block.
    """
    tokens, heads, head_dim = q.shape
    k, v = (_all_blocks(cache, step.block_table, layout) for cache in (k_cache, v_cache))
    requests, context, kv_heads, _ = k.shape
    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim).to(torch.float32)
    key = torch.arange(context, device=q.device, dtype=step.seq_lens.dtype)
    sinks = None if sinks is None else sinks.view(kv_heads, -1)
    if step.max_query_len == 1:  # one query a request: no request meets another's keys
        visible = _visible((step.seq_lens - 1).clamp(min=0), key, window)
        scores = _capped(torch.einsum("rhgd,rshd->rhgs", grouped, k) * scale, soft_cap)
        weights = _softmax(scores.masked_fill(~visible[:, None, None, :], float("-inf")), sinks)
        v = v.masked_fill(~visible[:, :, None, None], 0.0)
        mixed = torch.einsum("rhgs,rshd->rhgd", weights, v)
        return mixed.reshape(tokens, heads, head_dim).to(q.dtype)
    index = torch.arange(tokens, device=q.device, dtype=step.query_start.dtype)
    request = torch.searchsorted(step.query_start[1:], index, right=True, out_int32=index.dtype is torch.int32).clamp(
        max=requests - 1
    )
    query = step.seq_lens[request] - step.query_start[request + 1] + index
    visible = _visible(query.clamp(min=0), key, window).unsqueeze(1)  # [tokens, 1, context]
    own = request.unsqueeze(1) == torch.arange(requests, device=q.device, dtype=request.dtype)
    visible = visible & own.unsqueeze(2)  # [tokens, requests, context]
    scores = _capped(torch.einsum("thgd,rshd->thgrs", grouped, k) * scale, soft_cap)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    weights = _softmax(scores.flatten(-2), sinks).view_as(scores)
    seen = (visible & (index < step.query_start[-1])[:, None, None]).any(0)  # by no padding
    v = v.masked_fill(~seen[:, :, None, None], 0.0)
    return torch.einsum("thgrs,rshd->thgd", weights, v).reshape(tokens, heads, head_dim).to(q.dtype)


def _all_blocks(cache: Tensor, block_table: Tensor, layout: str) -> Tensor:
    """Float32 [requests, max context, kv_heads, head_dim]: every block of the table in order."""
    blocks = cache[block_table]
    if layout == "HND":
        blocks = blocks.transpose(2, 3)
    return blocks.flatten(1, 2).to(torch.float32)


def _visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Bool [queries, keys]: which key positions [keys] the query positions [queries] see."""
    query = query.unsqueeze(1)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def _bucket(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, *_: Any) -> Bucket:
    return Bucket(q.shape[0], step.max_query_len)


def _caches(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(k_cache), torch.empty_like(v_cache)


def _like_queries(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q)


_CACHE_FACTS = ("num_kv_heads", "head_dim", "block_size", "layout", "kv_dtype")

OPS = (
    Op("kv_write", kv_write, facts=_CACHE_FACTS, functional=functional_kv_write, outline=_caches),
    Op(
        "attention",
        attention,
        facts=("num_heads", "scale", "window", "sinks", "soft_cap", "static", *_CACHE_FACTS),
        bucket=_bucket,
        outline=_like_queries,
    ),
)
