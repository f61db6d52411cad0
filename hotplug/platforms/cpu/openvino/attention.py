"""Paged attention by OpenVINO's `PagedAttentionExtension`, which writes keys and values to the cache by itself.

So a cache write is no operation of the graph: it says what the attention that reads the cache has to write. The
extension takes the inputs below, by position; those that nothing here uses are empty, which turns their feature off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
from openvino import opset15 as op

from hotplug.vendor import PlatformError

if TYPE_CHECKING:
    from openvino import Output

    from hotplug.platforms.cpu.openvino.graph import Graph, Weight

BLOCK_SIZE = 32
"""Tokens of a block, the only size that the CPU plugin's kernel has."""


@dataclass(frozen=True, slots=True)
class Written:
    """A cache, and what a step writes to it: [tokens, kv_heads, head_dim]."""

    cache: Output
    rows: Output


def kv_write(
    graph: Graph, site: str, k: Output, v: Output, k_cache: Output | Written, v_cache: Output | Written, slots: Output,
    layout: str,
) -> tuple[Written, Written]:  # fmt: skip
    """A cache that a layer before wrote to is the same memory: layers of several KV groups share it."""
    if layout != "HND":
        raise PlatformError(f"OpenVINO's attention has no layout {layout}", where=site)
    # `finite_values` of the op: the extension multiplies values by weights of zero
    finite = op.is_finite(v).output(0)
    k = op.select(finite, k, graph.scalar(float("nan"), ov.Type.f32)).output(0)
    v = op.select(finite, v, graph.scalar(0.0, ov.Type.f32)).output(0)
    k_cache, v_cache = (cache.cache if isinstance(cache, Written) else cache for cache in (k_cache, v_cache))
    return Written(k_cache, k), Written(v_cache, v)


def attention(
    graph: Graph, site: str, q: Output, k: Written, v: Written, block_table: Output, query_start: Output,
    seq_lens: Output, max_query_len: int, scale: float, window: int | None, layout: str,
    sinks: Weight | None = None, soft_cap: float | None = None,
) -> Output:  # fmt: skip
    if soft_cap is not None:
        raise PlatformError("OpenVINO's attention has no soft cap", where=site, hint="Use --exec eager.")
    heads, dim = (q.get_partial_shape()[i].get_length() for i in (1, 2))
    kv_heads = k.rows.get_partial_shape()[1].get_length()
    flat = [op.reshape(x, graph.ints(0, n * dim), True).output(0)
            for x, n in ((q, heads), (k.rows, kv_heads), (v.rows, kv_heads))]  # fmt: skip
    table = block_table.get_node().get_friendly_name()
    lengths = graph.once(("lengths", table), lambda: _lengths(graph, block_table, query_start, seq_lens))
    past, begins, blocks, block_begins, longest = lengths
    i32, f32 = ov.Type.i32, ov.Type.f32
    none, zero = graph.once("none", lambda: _empty(i32)), graph.scalar(0, i32)
    nothing = graph.once("nothing", lambda: _empty(f32))
    node = ov.op._PagedAttentionExtension([
        *flat, k.cache, v.cache, past, begins, blocks, block_begins,
        graph.scalar(scale, f32),
        graph.scalar(window or 0, i32),
        nothing,  # ALiBi slopes
        longest,
        none,  # windows of score aggregation
        none, none, nothing,  # rotation of blocks already written
        nothing, zero, zero,  # XAttention: threshold, block size, stride
        nothing if sinks is None else _sinks(graph, sinks, heads),
        zero, none, none, none,  # eviction by diversity
        none,  # token types
        graph.once("no bias", lambda: _empty(ov.Type.u8)), none,  # bias among a step's queries
    ])  # fmt: skip
    facts = node.get_rt_info()
    facts["num_k_heads"] = facts["num_v_heads"] = kv_heads
    facts["k_head_size"] = facts["v_head_size"] = dim
    return op.reshape(node.output(0), graph.ints(0, heads, dim), True).output(0)


def _lengths(graph: Graph, block_table: Output, query_start: Output, seq_lens: Output) -> tuple[Any, ...]:
    """int32: tokens before this step [R], first query [R + 1], block ids [R * columns], each request's first of them
    [R + 1], the longest length."""
    i32 = ov.Type.i32
    starts, lens = (op.convert(x, i32).output(0) for x in (query_start, seq_lens))
    requests, columns = op.split(op.shape_of(block_table, i32), graph.scalar(0, i32), 2).outputs()
    first, last = graph.ints(0), graph.ints(np.iinfo(np.int64).max)
    one = graph.ints(1)
    queries = op.subtract(op.slice(starts, one, last, one, first), op.slice(starts, first, graph.ints(-1), one, first))
    past = op.subtract(lens, queries).output(0)
    blocks = op.reshape(op.convert(block_table, i32), graph.ints(-1), False).output(0)
    count = op.add(op.squeeze(requests, first), graph.scalar(1, i32))
    numbers = op.range(graph.scalar(0, i32), count, graph.scalar(1, i32), i32)
    return past, starts, blocks, op.multiply(numbers, columns).output(0), op.reduce_max(lens, first, False).output(0)


def _empty(kind: Any) -> Output:
    return op.constant(np.zeros(0, np.int32), kind).output(0)


def _sinks(graph: Graph, sinks: Weight, heads: int) -> Output:
    return op.reshape(sinks.output, graph.ints(1, heads, 1, 1), False).output(0)
