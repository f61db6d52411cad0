"""Causal attention of prompt chunks on Hopper, over paged NHD caches: a warp that copies, and warps that multiply.

FlashAttention-3's division of work (Shah et al., 2024): one warp asks for tiles by TMA; two warpgroups of 64 queries
each multiply them, and while a tile's softmax runs the second product of the tile before. Written in Gluon, because
Triton's compiler does not divide work so on Hopper. Windows, sinks and soft caps are left to the Triton kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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

from hotplug.platforms.cuda.kernels import gpu
from hotplug.platforms.cuda.kernels.attention import attention as paged_attention
from hotplug.platforms.cuda.kernels.barrier import thread_barrier
from hotplug.platforms.cuda.kernels.decode_attention import decode
from hotplug.platforms.cuda.kernels.gathered_attention import STATIC, plain
from hotplug.platforms.cuda.kernels.made import made
from hotplug.platforms.cuda.kernels.softmax import factors
from hotplug.vendor import AttentionInputs, Bucket, Impl, SiteSpec, Verdict

ROWS = 64
"""Queries of a warpgroup; a program has two."""
COLS = 64
"""Elements of a row of shared memory, 128 bytes, which lie apart by swizzling: what is copied at once."""
HEAD_DIMS = (64, 128)
BLOCK = 64
"""Cells that a block of the cache has, or a multiple of it: what is copied of a tile at once is of one block."""
REGISTERS = (24, 240)
"""Of a thread that copies, and of one that multiplies."""
SHORT = 2048
"""Queries of a chunk up to which this is faster than FlashAttention-3, which gathers the keys first."""


class HopperConfig(NamedTuple):
    """How prompt chunks run."""

    keys: int = 128
    stages: int = 2
    """Tiles of keys, and of values, in flight."""


def config_for(dim: int) -> HopperConfig:
    """The configuration for heads of `dim` elements: as many stages as fit beside the queries and the result."""
    return HopperConfig(stages=2 if dim == 128 else 4)


@gluon.jit
def nth_item(n, program, programs):
    """The n-th item of a program: dealt out there and back, so that of items that shrink all get about as much."""
    return n * programs + program + (n % 2) * (programs - 1 - 2 * program)


@gluon.jit
def place_of(item, heads, requests, tiles):
    """(request, tile, head) of an item. The last tiles, which have the most keys, are first; heads are neighbours."""
    rest = item // heads
    return rest % requests, tiles - 1 - rest // requests, item % heads


@gluon.jit
def key_tiles(first, rows, length, KEYS: gl.constexpr):
    """Tiles of keys that any of `rows` queries sees, of which the first is at position `first`."""
    return (min(first + rows, length) + KEYS - 1) // KEYS


@gluon.jit
def whole_tiles(first, last, KEYS: gl.constexpr):
    """Tiles of keys, of `last`, that the query at position `first` sees whole, and so do those after it."""
    return min((first + 1) // KEYS, last)


@gluon.jit
def slot_of(n, STAGES: gl.constexpr):
    """Where the n-th tile lies in a ring, and the parity of the phase of its barriers."""
    return n % STAGES, (n // STAGES) & 1


@gluon.jit
def _request(query_start, seq_lens, request):
    """First query, queries and length of a request."""
    begin = gl.load(query_start + request).to(gl.int32)
    queries = gl.load(query_start + request + 1).to(gl.int32) - begin
    return begin, queries, gl.load(seq_lens + request).to(gl.int32)


@gluon.jit
def _cell(table, position, blocks, SIZE: gl.constexpr):
    """Where the cache holds the key at `position`. Past the sequence's blocks its last one is read, and masked."""
    return gl.load(table + min(position // SIZE, blocks - 1)).to(gl.int32) * SIZE + position % SIZE


@gluon.jit
def _copy(rows, ring, full, slot, cell, cell_after, col, KEYS: gl.constexpr, DIM: gl.constexpr):
    """Request a tile of a head's keys or values, which begin at column `col`, into `slot`.

    It is of one box of rows from `cell` on, or of two from `cell` and `cell_after` on. `ring` is of boxes of 64
    columns; a slot has those of a tile's first 64 columns, then those of the others.
    """
    BOX: gl.constexpr = rows.block_shape[0]  # noqa: N806
    WIDE: gl.constexpr = rows.block_shape[1]  # noqa: N806
    parts: gl.constexpr = KEYS // BOX
    panels: gl.constexpr = DIM // WIDE
    mbarrier.expect(full.index(slot), KEYS * DIM * 2)
    for panel in gl.static_range(panels):
        first = (slot * panels + panel) * parts
        tma.async_copy_global_to_shared(rows, [cell, col + panel * WIDE], full.index(slot), ring.index(first))
        if parts == 2:
            tma.async_copy_global_to_shared(rows, [cell_after, col + panel * WIDE], full.index(slot),
                                            ring.index(first + 1))  # fmt: skip


@gluon.jit
def _produce(q, k_rows, v_rows, ring_q, ring_k, ring_v, bars, block_table, query_start, seq_lens, table_stride,
             first_request, heads, requests, tiles, GROUP: gl.constexpr, DIM: gl.constexpr, SIZE: gl.constexpr,
             KEYS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr):  # fmt: skip
    """Ask for the queries, keys and values of the program's items, as the places for them get free."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    BOX: gl.constexpr = k_rows.block_shape[0]  # noqa: N806
    WIDE: gl.constexpr = k_rows.block_shape[1]  # noqa: N806
    boxes: gl.constexpr = STAGES * (KEYS // BOX) * (DIM // WIDE)
    boxes_k = ring_k._reinterpret(ring_k.dtype, [boxes, BOX, WIDE], k_rows.layout)
    boxes_v = ring_v._reinterpret(ring_v.dtype, [boxes, BOX, WIDE], v_rows.layout)
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    items = heads * requests * tiles
    done = 0
    taken = 0
    for n in range((items + programs - 1) // programs):
        item = nth_item(n, program, programs)
        if item < items:
            index, tile, head = place_of(item, heads, requests, tiles)
            request = index + first_request
            begin, queries, length = _request(query_start, seq_lens, request)
            if tile * 2 * ROWS < queries:
                last = key_tiles(length - queries + tile * 2 * ROWS, 2 * ROWS, length, KEYS)
                table = block_table + request.to(gl.int64) * table_stride
                blocks = (length + SIZE - 1) // SIZE
                col = head // GROUP * DIM
                for j in range(last):
                    slot, parity = slot_of(done, STAGES)
                    cell = _cell(table, j * KEYS, blocks, SIZE)
                    cell_after = _cell(table, j * KEYS + BOX, blocks, SIZE)
                    mbarrier.wait(k_empty.index(slot), parity ^ 1)
                    _copy(k_rows, boxes_k, k_full, slot, cell, cell_after, col, KEYS, DIM)
                    if j == 0:
                        for half in gl.static_range(2):
                            mbarrier.wait(q_empty.index(half), (taken & 1) ^ 1)
                            mbarrier.expect(q_full.index(half), ROWS * DIM * 2)
                            row = begin + (2 * tile + half) * ROWS
                            tma.async_copy_global_to_shared(q, [row, head * DIM], q_full.index(half),
                                                            ring_q.index(half))  # fmt: skip
                    mbarrier.wait(v_empty.index(slot), parity ^ 1)
                    _copy(v_rows, boxes_v, v_full, slot, cell, cell_after, col, KEYS, DIM)
                    done += 1
                taken += 1


@gluon.jit
def _hide(products, first, start, KEYS: gl.constexpr):
    """-inf for what is after a query; queries are at positions from `first` on, keys from `start` on."""
    mma: gl.constexpr = products.type.layout
    ROWS: gl.constexpr = products.shape[0]  # noqa: N806
    place = first + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    position = start + gl.arange(0, KEYS, gl.SliceLayout(0, mma))
    return gl.where(position[None, :] <= place[:, None], products, float("-inf"))


@gluon.jit
def _weigh(products, best, total, scale):
    """The online softmax over one more tile, of which each query has seen a key of some tile: `softmax.accumulate`.

    `best` is of products that are not scaled yet. Returns weights, best, total and what older sums are to be times.
    """
    new = gl.maximum(best, gl.max(products, 1))
    shift = new * scale
    weights = gl.exp2(products * scale - shift[:, None])
    old = gl.exp2(best * scale - shift)
    return weights, new, total * old + gl.sum(weights, 1), old


@gluon.jit
def _clear(values, valid):
    """Zeros for the rows of a tile of values from `valid` on: what nobody wrote may be NaN, and so be NaN times 0."""
    KEYS: gl.constexpr = values.shape[0]  # noqa: N806
    DIM: gl.constexpr = values.shape[1]  # noqa: N806
    step: gl.constexpr = 16
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    for i in gl.static_range(KEYS // step):
        if (i + 1) * step > valid:
            part = values.slice(i * step, step)
            row = i * step + gl.arange(0, step, gl.SliceLayout(1, lines))
            part.store(gl.where((row < valid)[:, None], part.load(lines), 0.0))
    fence_async_shared()
    thread_barrier()


@gluon.jit
def _release(bar):
    """Every warp is done with what the barrier guards."""
    thread_barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def _advance(queries, ring_k, ring_v, bars, done, weights, best, total, mixed, first, start, more, scale,
             KEYS: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    """The first product of tile number `done`, and while its softmax runs the second one of the tile before.

    Its keys have been waited for. Those of the tile after it, if there are `more`, are between the softmax and the end
    of the second product, because ptxas, which would wait for the product first, moves nothing across a loop.
    """
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty = bars
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    sums: gl.constexpr = mixed.type.layout
    ROWS: gl.constexpr = mixed.shape[0]  # noqa: N806
    slot = done % STAGES
    slot_v, parity_v = slot_of(done - 1, STAGES)
    slot_after, parity_after = slot_of(done + 1, STAGES)
    nothing = gl.zeros([ROWS, KEYS], gl.float32, mma)
    products = warpgroup_mma(queries, ring_k.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(slot_v), parity_v)
    mixed = warpgroup_mma(weights, ring_v.index(slot_v), mixed, is_async=True)
    products = warpgroup_mma_wait(1, deps=(products,))
    _release(k_empty.index(slot))
    if MASKED:
        products = _hide(products, first, start, KEYS)
    following, best, total, old = _weigh(products, best, total, scale)
    mbarrier.wait(k_full.index(slot_after), parity_after, pred=more)
    mixed = warpgroup_mma_wait(0, deps=(mixed,))
    _release(v_empty.index(slot_v))
    mixed = mixed * gl.convert_layout(old, gl.SliceLayout(1, sums))[:, None]
    following = gl.convert_layout(following.to(ring_v.dtype), gl.DotOperandLayout(0, sums, 2))
    return following, best, total, mixed


@gluon.jit
def _consume(ring_q, ring_k, ring_v, bars, out, query_start, seq_lens, scale, out_token, out_head, first_request, heads,
             requests, tiles, HALF: gl.constexpr, DIM: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
             ROWS: gl.constexpr):  # fmt: skip
    """Attention of half the queries of each item. Tiles pass in the producer's order."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    items = heads * requests * tiles
    dtype: gl.constexpr = ring_v.dtype
    done = 0
    taken = 0
    for n in range((items + programs - 1) // programs):
        item = nth_item(n, program, programs)
        if item < items:
            index, tile, head = place_of(item, heads, requests, tiles)
            begin, count, length = _request(query_start, seq_lens, index + first_request)
            if tile * 2 * ROWS < count:
                before = length - count + tile * 2 * ROWS
                first = before + HALF * ROWS
                last = key_tiles(before, 2 * ROWS, length, KEYS)  # of both halves, and so of the producer
                whole = whole_tiles(first, last, KEYS)
                queries = ring_q.index(HALF)
                mbarrier.wait(q_full.index(HALF), taken & 1)
                slot, parity = slot_of(done, STAGES)
                mbarrier.wait(k_full.index(slot), parity)
                nothing = gl.zeros([ROWS, KEYS], gl.float32, mma)
                products = warpgroup_mma(queries, ring_k.index(slot).permute((1, 0)), nothing, use_acc=False,
                                         is_async=True)  # fmt: skip
                products = warpgroup_mma_wait(0, deps=(products,))
                _release(k_empty.index(slot))
                products = _hide(products, first, 0, KEYS)
                best = gl.max(products, 1)
                weights = gl.exp2(products * scale - (best * scale)[:, None])
                total = gl.sum(weights, 1)
                weights = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, sums, 2))
                mixed = gl.zeros([ROWS, DIM], gl.float32, sums)
                done += 1
                slot, parity = slot_of(done, STAGES)
                mbarrier.wait(k_full.index(slot), parity, pred=last > 1)
                for j in range(1, whole):
                    weights, best, total, mixed = _advance(
                        queries, ring_k, ring_v, bars, done, weights, best, total, mixed, first, j * KEYS, j + 1 < last,
                        scale, KEYS, STAGES, False,
                    )  # fmt: skip
                    done += 1
                for j in range(max(whole, 1), last):
                    weights, best, total, mixed = _advance(
                        queries, ring_k, ring_v, bars, done, weights, best, total, mixed, first, j * KEYS, j + 1 < last,
                        scale, KEYS, STAGES, True,
                    )  # fmt: skip
                    done += 1
                _release(q_empty.index(HALF))
                slot, parity = slot_of(done - 1, STAGES)
                mbarrier.wait(v_full.index(slot), parity)
                if last * KEYS > length:
                    _clear(ring_v.index(slot), length - (last - 1) * KEYS)
                mixed = warpgroup_mma(weights, ring_v.index(slot), mixed, is_async=True)
                mixed = warpgroup_mma_wait(0, deps=(mixed,))
                _release(v_empty.index(slot))
                mixed = mixed * gl.convert_layout(1 / total, gl.SliceLayout(1, sums))[:, None]
                result = gl.convert_layout(mixed.to(dtype), lines)
                row = (2 * tile + HALF) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, lines))
                cols = gl.arange(0, DIM, gl.SliceLayout(0, lines))
                target = out + (begin + row).to(gl.int64)[:, None] * out_token + head * out_head + cols[None, :]
                gl.store(target, result, mask=(row < count)[:, None] & (cols < DIM)[None, :])
                taken += 1


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit(do_not_specialize=["first_request", "requests", "tiles", "table_stride"])
def _prefill_hopper(q, k_rows, v_rows, out, block_table, query_start, seq_lens, scale, out_token, out_head,
                    table_stride, first_request, requests, tiles, heads: gl.constexpr, GROUP: gl.constexpr,
                    SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
                    COPIER: gl.constexpr, MULTIPLIER: gl.constexpr):  # fmt: skip
    """The tiles of 2 * ROWS queries of every head and request, from the last of each request on, dealt to the programs.

    q: a descriptor of tiles [ROWS, DIM] of the queries [tokens, heads * DIM]; k_rows and v_rows of boxes of the caches
    [cells, kv_heads * DIM], each within one block of SIZE cells.
    """
    ROWS: gl.constexpr = q.block_shape[0]  # noqa: N806
    DIM: gl.constexpr = q.block_shape[1]  # noqa: N806
    dtype: gl.constexpr = q.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, DIM], dtype)
    ring_q = gl.allocate_shared_memory(dtype, [2, ROWS, DIM], q.layout)
    ring_k = gl.allocate_shared_memory(dtype, [STAGES, KEYS, DIM], tile)
    ring_v = gl.allocate_shared_memory(dtype, [STAGES, KEYS, DIM], tile)
    q_full = _barriers(2, 1)
    q_empty = _barriers(2, 1)
    k_full = _barriers(STAGES, 1)
    v_full = _barriers(STAGES, 1)
    k_empty = _barriers(STAGES, 2)
    v_empty = _barriers(STAGES, 2)
    fence_async_shared()
    thread_barrier()  # every thread sees the barriers before one is waited for
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize([
        (_consume, (ring_q, ring_k, ring_v, bars, out, query_start, seq_lens, scale, out_token, out_head,
                    first_request, heads, requests, tiles, 0, DIM, KEYS, STAGES, ROWS)),
        (_consume, (ring_q, ring_k, ring_v, bars, out, query_start, seq_lens, scale, out_token, out_head,
                    first_request, heads, requests, tiles, 1, DIM, KEYS, STAGES, ROWS)),
        (_produce, (q, k_rows, v_rows, ring_q, ring_k, ring_v, bars, block_table, query_start, seq_lens, table_stride,
                    first_request, heads, requests, tiles, GROUP, DIM, SIZE, KEYS, STAGES, ROWS)),
    ], [4, 1], [MULTIPLIER, COPIER])  # fmt: skip


def _boxes(cache: Tensor, keys: int, layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    """Boxes of `keys` cells and 64 columns of a cache [num_blocks, block_size, kv_heads, head_dim]."""
    flat = cache.view(-1, cache.shape[-2] * cache.shape[-1])
    return TensorDescriptor.from_tensor(flat, [keys, COLS], layout)


def _arguments(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, out: Tensor, scale: float,
               config: HopperConfig) -> tuple[int, tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """What `prefill` launches `_prefill_hopper` with: programs, arguments, options."""
    heads, dim = q.shape[1:]
    size, kv_heads, keys = k_cache.shape[1], k_cache.shape[2], config.keys
    elements = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
    if q.dtype not in elements or k_cache.dtype is not q.dtype or v_cache.dtype is not q.dtype:
        raise TypeError(f"prefill takes bfloat16 or float16, not {q.dtype}, {k_cache.dtype} and {v_cache.dtype}")
    if dim not in HEAD_DIMS or size % BLOCK or keys not in (64, 128) or scale <= 0:
        raise ValueError(f"prefill takes heads of {HEAD_DIMS}, blocks of whole {BLOCK}s, tiles of 64 or 128 keys and "
                         f"positive scales, not {dim}, {size}, {keys} and {scale}")  # fmt: skip
    element = elements[q.dtype]
    box = keys if size % keys == 0 else BLOCK
    layout, layout_q = (gl.NVMMASharedLayout.get_default_for(shape, element) for shape in ([box, COLS], [ROWS, dim]))
    requests = len(step.seq_lens) - step.num_decodes
    tiles = triton.cdiv(step.max_query_len, 2 * ROWS)
    programs = min(heads * requests * tiles, gpu.multiprocessors(q.device))
    return programs, (
        TensorDescriptor.from_tensor(q.flatten(1), [ROWS, dim], layout_q), _boxes(k_cache, box, layout),
        _boxes(v_cache, box, layout), out, step.block_table, step.query_start, step.seq_lens, factors(scale, None)[0],
        out.stride(0), out.stride(1), step.block_table.stride(0), step.num_decodes, requests, tiles, heads,
        heads // kv_heads, size, keys, config.stages, *REGISTERS,
    ), {"num_warps": 4}  # fmt: skip


def prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, out: Tensor, scale: float,
            config: HopperConfig | None = None) -> None:  # fmt: skip
    """Every request after the decodes; q and out [tokens, heads, head_dim] hold all tokens of the step.

    Caches [num_blocks, block_size, kv_heads, head_dim] of q's dtype, on a device of compute capability 9.0. Heads of q
    that do not lie side by side are copied first. Raises TypeError and ValueError.
    """
    programs, arguments, options = _arguments(q, k_cache, v_cache, step, out, scale, config or config_for(q.shape[2]))
    _prefill_hopper[(programs,)](*arguments, **options)


def compile_for(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, out: Tensor, scale: float,
                config: HopperConfig | None = None) -> Any:  # fmt: skip
    """The compiled kernel of such a call of `prefill`, which is not launched."""
    programs, arguments, options = _arguments(q, k_cache, v_cache, step, out, scale, config or config_for(q.shape[2]))
    return _prefill_hopper.warmup(*arguments, grid=(programs,), **options)


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, sinks: Tensor | None, *, scale: float,
    window: int | None, soft_cap: float | None,
) -> Tensor:  # fmt: skip
    """Decodes by the Triton kernel, prompt chunks by the one above; lengths are read on the device.

    Queries whose addresses descriptors cannot hold, no multiples of 16 bytes, go to the Triton kernel too.
    """
    decodes = step.num_decodes
    if decodes == len(step.seq_lens) or q.data_ptr() % 16 or q.stride(0) * q.element_size() % 16:
        return paged_attention(q, k_cache, v_cache, step, sinks, scale=scale, window=window, soft_cap=soft_cap)
    padded = step.query_lens_host is None and not decodes  # a static step of chunks: tokens that are of no request
    out = (torch.zeros if padded else torch.empty)(q.shape, dtype=q.dtype, device=q.device)
    if decodes:
        decode(q[:decodes], k_cache, v_cache, step, out[:decodes], scale, window, sinks, soft_cap)
    prefill(q, k_cache, v_cache, step, out, scale)
    return out


def _check(spec: SiteSpec) -> Verdict:
    if spec.arch != "sm_90":
        return Verdict(False, f"is for sm_90, not {spec.arch}")
    verdict = plain(spec, window=False, soft_cap=False, dtypes=("bfloat16", "float16"))
    if not verdict.ok:
        return verdict
    if spec["head_dim"] not in HEAD_DIMS:
        return Verdict(False, f"has heads of {' or '.join(map(str, HEAD_DIMS))}, not {spec['head_dim']}")
    if spec["block_size"] % BLOCK:
        return Verdict(False, f"reads blocks of whole {BLOCK}s, not {spec['block_size']}")
    interpreted = triton.knobs.runtime.interpret
    return Verdict(not interpreted, "is in Gluon, which Triton's interpreter does not run" if interpreted else "")


def _fills_a_tile(bucket: Bucket) -> bool:
    return bucket.max_query_len >= 2 * ROWS


def _is_short(bucket: Bucket) -> bool:
    return _fills_a_tile(bucket) and bucket.max_query_len <= SHORT


KERNELS = (
    Impl("attention", "cuda.hopper", make=made(attention, *STATIC), check=_check, accepts=_is_short, rank=25),
    Impl("attention", "cuda.hopper_long", make=made(attention, *STATIC), check=_check, accepts=_fills_a_tile,
         rank=15),
)  # fmt: skip
