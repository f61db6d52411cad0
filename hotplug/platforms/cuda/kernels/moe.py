"""The experts of a mixture: reading each chosen expert once for few tokens, grouped matrix products for more.

An assignment is a token and one of its experts, numbered token * top_k + slot. For few assignments every one reads
its expert by itself (`few`). For more, assignments are put in order by expert, each expert's
filled up to whole blocks of rows (`by_expert`), so that a program multiplies one block by one expert's weights
(`grouped`), and `combine` adds up a token's experts. Where a row lies within its expert is left to atomics; its value
does not depend on it, and no sum is in an order of chance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hotplug.platforms.cuda.kernels import gpu, pdl
from hotplug.platforms.cuda.kernels.dense import silu_mul
from hotplug.platforms.cuda.target import target

FEW = 32
"""Most assignments that read their experts one by one."""
FEW_ROWS, FEW_COLS = 4, 256
"""Weight rows of a program, a warp each, and elements of a row that a warp reads at once: 16 bytes a lane."""
GROUP = 8
"""Blocks of rows that share a weight's columns while they are in the cache."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a grouped product is cut."""

    rows: int
    """Assignments of a block."""
    cols: int
    """Outputs of a program; of gate and of up each."""
    depth: int
    warps: int
    stages: int
    swap: bool = False
    """Whether the weights are the first operand, whose tile is at least 64 rows: few assignments waste nothing."""
    tma: bool = False
    """Whether what lies in rows is read by the tensor memory accelerator, if rows are multiples of 16 bytes."""


def gate_up_tiles(assignments: int, experts: int, size: int) -> Tiles:
    """By how many assignments an expert has, for elements of `size` bytes."""
    rows = block_rows(assignments / experts)
    if size == 4:
        return Tiles(min(rows, 64), 32, 32, 4, 2)
    if rows <= 64:
        return Tiles(rows, 64, 64, 4, 5 if rows <= 32 else 4, swap=True)
    return Tiles(rows, 128, 64, 8, 4, tma=True)


def down_tiles(assignments: int, experts: int, size: int) -> Tiles:
    """The same of the second product; its blocks of rows are those of the first."""
    rows = block_rows(assignments / experts)
    if size == 4:
        return Tiles(min(rows, 64), 64, 32, 4, 2)
    if rows <= 64:
        return Tiles(rows, 64, 128, 4, 4 if rows <= 32 else 3, swap=True)
    return Tiles(rows, 256, 64, 8, 3, tma=True)


def block_rows(each: float) -> int:
    """Rows of a block for `each` assignments an expert on average: few experts need two blocks, which read twice."""
    return next((rows for rows in (16, 32, 64) if each <= rows * 0.6), 128)


SHARED = {(0, 0): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
"""KiB of shared memory that a program may have, by compute capability; 99 elsewhere (CUDA Programming Guide, table of
technical specifications); AMD's local data share."""


def fitting(tiles: Tiles, weights: int, size: int, device: torch.device) -> Tiles:
    """`tiles`, chosen for Hopper, as `device` holds them; each stage has `weights` tiles of weights.

    Shared memory bounds the stages, and registers the sums, which only Hopper's products leave room beside.
    """
    capability = gpu.capability(device)
    if capability < gpu.HOPPER and tiles.rows * tiles.cols * weights > 128 * 128:
        tiles = replace(tiles, cols=tiles.cols // 2)
    stage = tiles.depth * (tiles.rows + weights * tiles.cols) * size
    return replace(tiles, stages=max(min(tiles.stages, (SHARED.get(capability, 99) - 1) * 1024 // stage), 1))


# --- few assignments ------------------------------------------------------------------------------


@triton.jit
def _load(pointer, mask, WHOLE: tl.constexpr):
    """What lies at `pointer`, unmasked where all of it is there."""
    value = tl.load(pointer) if WHOLE else tl.load(pointer, mask=mask, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _few_gate_up(x, experts, gate_up, out, x_stride, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
                 ROWS: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program an assignment and ROWS of its expert's width: silu(gate) * up in out [assignments, WIDTH]."""
    pdl.release(PDL)
    pdl.wait(PDL)
    assignment = tl.program_id(1)
    expert = tl.load(experts + assignment).to(tl.int64)
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    there = (rows < WIDTH)[:, None]
    whole: tl.constexpr = HIDDEN % COLS == 0 and WIDTH % ROWS == 0
    token = x + (assignment // TOP_K) * x_stride
    gates = gate_up + expert * (2 * WIDTH * HIDDEN) + rows[:, None] * HIDDEN
    gate = tl.zeros([ROWS, COLS], tl.float32)
    up = tl.zeros([ROWS, COLS], tl.float32)
    for start in tl.static_range(0, HIDDEN, COLS):
        at = start + cols
        mask = there & (at < HIDDEN)[None, :]
        # A row as wide as the tile: in a layout of its own it would go through shared memory, behind a barrier.
        value = _load(tl.broadcast_to(token + at[None, :], [ROWS, COLS]), mask, whole)
        gate += value * _load(gates + at[None, :], mask, whole)
        up += value * _load(gates + WIDTH * HIDDEN + at[None, :], mask, whole)
    gated = tl.sum(gate, 1)
    gated = gated / (1 + tl.exp(-gated)) * tl.sum(up, 1)
    tl.store(out + assignment * WIDTH + rows, gated.to(out.dtype.element_ty), mask=rows < WIDTH)


@triton.jit
def _few_down(gated, weights, experts, down, out, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
              ROWS: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program a token and ROWS of the hidden state, over all experts of the token."""
    pdl.release(PDL)
    pdl.wait(PDL)
    token = tl.program_id(1)
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    there = (rows < HIDDEN)[:, None]
    whole: tl.constexpr = WIDTH % COLS == 0 and HIDDEN % ROWS == 0
    total = tl.zeros([ROWS, COLS], tl.float32)
    for slot in tl.static_range(TOP_K):
        assignment = token * TOP_K + slot
        expert = tl.load(experts + assignment).to(tl.int64)
        share = tl.load(weights + assignment)
        matrix = down + expert * (HIDDEN * WIDTH) + rows[:, None] * WIDTH
        for start in tl.static_range(0, WIDTH, COLS):
            at = start + cols
            mask = there & (at < WIDTH)[None, :]
            value = _load(tl.broadcast_to(gated + assignment * WIDTH + at[None, :], [ROWS, COLS]), mask, whole)
            total += value * share * _load(matrix + at[None, :], mask, whole)
    tl.store(out + token * HIDDEN + rows, tl.sum(total, 1).to(out.dtype.element_ty), mask=rows < HIDDEN)


def few(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, rows: int = FEW_ROWS,
    cols: int = FEW_COLS,
) -> Tensor:  # fmt: skip
    """`moe_experts` with every assignment reading its expert by itself."""
    (tokens, hidden), top_k, width = x.shape, experts.shape[1], down.shape[2]
    gated = torch.empty((tokens * top_k, width), dtype=x.dtype, device=x.device)
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    options = pdl.options(x.device)
    deep, wide = (min(triton.next_power_of_2(n), cols) for n in (hidden, width))
    _few_gate_up[(triton.cdiv(width, rows), tokens * top_k)](
        x, experts, gate_up, gated, x.stride(0), top_k, hidden, width, rows, deep, num_warps=4, **options
    )
    _few_down[(triton.cdiv(hidden, rows), tokens)](
        gated, weights, experts, down, out, top_k, hidden, width, rows, wide, num_warps=4, **options
    )
    return out


# --- assignments in order by expert ---------------------------------------------------------------


@triton.jit(do_not_specialize=["assignments"])
def _count(experts, counts, ranks, assignments, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Adds up the assignments of each expert in counts; what an assignment found there is its rank."""
    pdl.release(PDL)
    pdl.wait(PDL)
    assignment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = assignment < assignments
    expert = tl.load(experts + assignment, mask=mask, other=0)
    tl.store(ranks + assignment, tl.atomic_add(counts + expert, 1, mask=mask, sem="relaxed"), mask=mask)


@triton.jit(do_not_specialize=["assignments", "blocks"])
def _place(experts, counts, ranks, order, position, block_expert, block_rows, assignments, blocks, num_experts,
           ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, ALONE: tl.constexpr,
           PDL: tl.constexpr):  # fmt: skip
    """Writes what `Order` holds. ALONE: a single program, which counts too."""
    pdl.release(PDL)
    pdl.wait(PDL)
    ids, mine = tl.arange(0, EXPERTS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real, mask = ids < num_experts, mine < assignments
    expert = tl.load(experts + mine, mask=mask, other=0)
    if ALONE:
        tl.store(counts + ids, tl.zeros([EXPERTS], tl.int32), mask=real)
        tl.debug_barrier()
        rank = tl.atomic_add(counts + expert, 1, mask=mask, sem="relaxed")
        tl.debug_barrier()
        count = tl.load(counts + ids, mask=real, other=0, volatile=True)  # past the first-level cache, as atomics go
    else:
        rank = tl.load(ranks + mine, mask=mask, other=0)
        count = tl.load(counts + ids, mask=real, other=0)
    needed = (count + ROWS - 1) // ROWS
    end = tl.cumsum(needed, 0)
    first = end - needed
    row = tl.gather(first, expert, 0) * ROWS + rank
    tl.store(order + row, mine, mask=mask)
    tl.store(position + mine, row, mask=mask)
    tl.store(block_rows + mine, tl.zeros([BLOCK], tl.int32), mask=(mine >= tl.sum(needed, 0)) & (mine < blocks))
    if tl.program_id(0) == 0:
        for block in range(tl.max(needed, 0)):
            own = block < needed
            tl.store(block_expert + first + block, ids, mask=own)
            tl.store(block_rows + first + block, tl.minimum(count - block * ROWS, ROWS), mask=own)


ALONE = 1024
"""Most assignments that one program puts in order."""


@dataclass(frozen=True, slots=True)
class Order:
    """Assignments by expert, in blocks of one expert each. Int32, of sizes that follow from the shapes alone."""

    rows: Tensor
    """[blocks * rows of a block]: which assignment a row is; undefined past a block's own rows."""
    position: Tensor
    """[assignments]: which row an assignment is."""
    counts: Tensor
    """[num_experts]"""
    block_expert: Tensor
    """[blocks]; undefined for a block that has no rows."""
    block_rows: Tensor
    """[blocks]: how many of its rows a block has; 0 past the last in use."""


def by_expert(experts: Tensor, num_experts: int, rows: int) -> Order:
    """The order of `experts` [num_tokens, top_k], for blocks of `rows`."""
    assignments, device = experts.numel(), experts.device
    blocks, alone = most_blocks(assignments, num_experts, rows), assignments <= ALONE
    order, ranks, position, block_expert, block_rows = (
        torch.empty(n, dtype=torch.int32, device=device)
        for n in (blocks * rows, 0 if alone else assignments, assignments, blocks, blocks)
    )
    counts = (torch.empty if alone else torch.zeros)(num_experts, dtype=torch.int32, device=device)
    options, size = pdl.options(device), ALONE if alone else 256
    if not alone:
        _count[(triton.cdiv(assignments, size),)](experts, counts, ranks, assignments, size, num_warps=4, **options)
    _place[(triton.cdiv(assignments, size),)](
        experts, counts, ranks, order, position, block_expert, block_rows, assignments, blocks, num_experts, rows,
        triton.next_power_of_2(num_experts), size, alone, num_warps=8 if alone else 4, **options,
    )  # fmt: skip
    return Order(order, position, counts, block_expert, block_rows)


def most_blocks(assignments: int, num_experts: int, rows: int) -> int:
    """Blocks of `rows` that any spread of the assignments fits into: each expert leaves less than one unfilled."""
    return min(assignments // rows + num_experts, assignments)


# --- grouped products -----------------------------------------------------------------------------


@triton.jit
def _tile(program, blocks, columns, GROUP: tl.constexpr):
    """The block and column of a program: GROUP blocks go through all columns before the next ones do."""
    group = program // (GROUP * columns)
    size = tl.minimum(blocks - group * GROUP, GROUP)
    return group * GROUP + program % (GROUP * columns) % size, program % (GROUP * columns) // size


@triton.jit
def _read(matrix, first, rows, start, LENGTH: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
          TMA: tl.constexpr):  # fmt: skip
    """Tile [ROWS, DEPTH] of matrix [.., LENGTH] from row `first` and column `start`, with zeros past the last column.

    Of its rows `rows` are wanted; what the others hold is not said. With TMA the matrix is a descriptor.
    """
    if TMA:
        tile = matrix.load([first.to(tl.int32), start])
    else:
        row = first + tl.minimum(tl.arange(0, ROWS), rows - 1)
        at = start + tl.arange(0, DEPTH)
        pointer = matrix + row.to(tl.int64)[:, None] * LENGTH + at[None, :]
        tile = tl.load(pointer) if LENGTH % DEPTH == 0 else tl.load(pointer, mask=(at < LENGTH)[None, :], other=0.0)
    return tile


@triton.jit
def _product(tile, weight, total, SWAP: tl.constexpr):
    """total plus tile [rows, depth] times weight [cols, depth]; transposed where SWAP. Float32 stays float32."""
    if SWAP:
        total = tl.dot(weight, tl.trans(tile), total, input_precision="ieee")
    else:
        total = tl.dot(tile, tl.trans(weight), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["blocks"])
def _gate_up(x, gate_up, out, order, block_expert, block_rows, x_stride, blocks, TOP_K: tl.constexpr,
             HIDDEN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
             GROUP: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
             PDL: tl.constexpr):  # fmt: skip
    """A program a block and COLS of the width: silu(gate) * up in out [blocks * ROWS, WIDTH], in the order's rows."""
    pdl.release(PDL)
    pdl.wait(PDL)
    block, column = _tile(tl.program_id(0), blocks, tl.cdiv(WIDTH, COLS), GROUP)
    filled = tl.load(block_rows + block)
    if filled > 0:
        expert = tl.load(block_expert + block).to(tl.int64)
        rows, cols, deep = tl.arange(0, ROWS), column * COLS + tl.arange(0, COLS), tl.arange(0, DEPTH)
        # Rows that the block does not have read the first token: what comes of it is never read.
        assignment = tl.load(order + block * ROWS + rows, mask=rows < filled, other=0)
        source = x + (assignment // TOP_K).to(tl.int64)[:, None] * x_stride + deep[None, :]
        gates, left = expert * (2 * WIDTH) + column * COLS, WIDTH - column * COLS
        shape: tl.constexpr = [COLS, ROWS] if SWAP else [ROWS, COLS]
        gate = tl.zeros(shape, tl.float32)
        up = tl.zeros(shape, tl.float32)
        for start in range(0, HIDDEN, DEPTH):
            if HIDDEN % DEPTH == 0:
                tile = tl.load(source + start)
            else:
                tile = tl.load(source + start, mask=(start + deep < HIDDEN)[None, :], other=0.0)
            gate_tile = _read(gate_up, gates, left, start, HIDDEN, COLS, DEPTH, TMA)
            up_tile = _read(gate_up, gates + WIDTH, left, start, HIDDEN, COLS, DEPTH, TMA)
            gate = _product(tile, gate_tile, gate, SWAP)
            up = _product(tile, up_tile, up, SWAP)
        gated = (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty)
        if SWAP:
            gated = tl.trans(gated)
        target = out + (block * ROWS + rows).to(tl.int64)[:, None] * WIDTH + cols[None, :]
        tl.store(target, gated, mask=(cols < WIDTH)[None, :])


@triton.jit(do_not_specialize=["blocks"])
def _down(gated, down, out, block_expert, block_rows, blocks, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
          ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, SWAP: tl.constexpr,
          TMA: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program a block and COLS of the hidden state, in out [blocks * ROWS, HIDDEN], in the order's rows."""
    pdl.release(PDL)
    pdl.wait(PDL)
    block, column = _tile(tl.program_id(0), blocks, tl.cdiv(HIDDEN, COLS), GROUP)
    filled = tl.load(block_rows + block)
    if filled > 0:
        expert = tl.load(block_expert + block).to(tl.int64)
        rows, cols = tl.arange(0, ROWS), column * COLS + tl.arange(0, COLS)
        shape: tl.constexpr = [COLS, ROWS] if SWAP else [ROWS, COLS]
        total = tl.zeros(shape, tl.float32)
        for start in range(0, WIDTH, DEPTH):
            tile = _read(gated, block * ROWS, ROWS, start, WIDTH, ROWS, DEPTH, TMA)
            weight = _read(
                down, expert * HIDDEN + column * COLS, HIDDEN - column * COLS, start, WIDTH, COLS, DEPTH, TMA
            )
            total = _product(tile, weight, total, SWAP)
        if SWAP:
            total = tl.trans(total)
        target = out + (block * ROWS + rows).to(tl.int64)[:, None] * HIDDEN + cols[None, :]
        mask = (rows < filled)[:, None] & (cols < HIDDEN)[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _combine(parts, position, weights, out, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
             PDL: tl.constexpr):  # fmt: skip
    """A program a token and a piece of its hidden state: the sum over its experts, always in the same order."""
    pdl.release(PDL)
    pdl.wait(PDL)
    token, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < HIDDEN
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(TOP_K):
        row = tl.load(position + token * TOP_K + slot).to(tl.int64)
        part = tl.load(parts + row * HIDDEN + cols, mask=mask, other=0.0).to(tl.float32)
        total += part * tl.load(weights + token * TOP_K + slot)
    tl.store(out + token * HIDDEN + cols, total.to(out.dtype.element_ty), mask=mask)


def combine(parts: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    """Rows `position` [num_tokens * top_k] of `parts` [rows, hidden], summed by `weights` [num_tokens, top_k]."""
    (tokens, top_k), hidden = weights.shape, parts.shape[1]
    out = torch.empty((tokens, hidden), dtype=parts.dtype, device=parts.device)
    block = min(triton.next_power_of_2(hidden), 1024)
    _combine[(tokens, triton.cdiv(hidden, block))](
        parts, position, weights, out, top_k, hidden, block, num_warps=4, **pdl.options(parts.device)
    )
    return out


def grouped(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, first: Tiles, second: Tiles
) -> Tensor:
    """`moe_experts` by grouped products, cut as `first` and `second` say; both have the same rows."""
    hidden, top_k, (count, _, width) = x.shape[1], experts.shape[1], down.shape
    if hidden * x.element_size() % 16 or width * x.element_size() % 16:  # no rows for a descriptor
        first, second = replace(first, tma=False), replace(second, tma=False)
    first, second = (fitting(t, n, x.element_size(), target(x.device)) for t, n in ((first, 2), (second, 1)))
    order = by_expert(experts, count, first.rows)
    blocks, options = len(order.block_rows), pdl.options(x.device)
    gated = torch.empty((blocks * first.rows, width), dtype=x.dtype, device=x.device)
    _gate_up[(blocks * triton.cdiv(width, first.cols),)](
        x, _matrix(gate_up, first.cols, first), gated, order.rows, order.block_expert, order.block_rows, x.stride(0),
        blocks, top_k, hidden, width, first.rows, first.cols, first.depth, GROUP, first.swap, first.tma,
        num_warps=first.warps, num_stages=first.stages, **options,
    )  # fmt: skip
    parts = torch.empty((blocks * first.rows, hidden), dtype=x.dtype, device=x.device)
    _down[(blocks * triton.cdiv(hidden, second.cols),)](
        _matrix(gated, first.rows, second), _matrix(down, second.cols, second), parts, order.block_expert,
        order.block_rows, blocks, hidden, width, first.rows, second.cols, second.depth, GROUP, second.swap, second.tma,
        num_warps=second.warps, num_stages=second.stages, **options,
    )  # fmt: skip
    return combine(parts, order.position, weights)


def _matrix(x: Tensor, rows: int, tiles: Tiles) -> Tensor | TensorDescriptor:
    """`x` [.., columns] as a kernel reads it in tiles of `rows`."""
    if not tiles.tma:
        return x
    flat = x.view(-1, x.shape[-1])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, tiles.depth])


def moe_experts(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One by one or grouped, by the number of assignments."""
    assignments, count, size = experts.numel(), down.shape[0], x.element_size()
    if not assignments:
        return torch.empty_like(x)
    if assignments <= FEW:
        return few(x, weights, experts, gate_up, down)
    first, second = gate_up_tiles(assignments, count, size), down_tiles(assignments, count, size)
    return grouped(x, weights, experts, gate_up, down, first, second)


def grouped_mm(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`moe_experts` by PyTorch's own grouped product (CUTLASS), for bfloat16: rows are gathered before it."""
    if not x.shape[0]:
        return torch.empty_like(x)
    order = by_expert(experts, down.shape[0], rows=1)
    ends = order.counts.cumsum(0, dtype=torch.int32)
    rows = x.index_select(0, order.rows // experts.shape[1])
    gated = silu_mul(F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends))
    return combine(F.grouped_mm(gated, down.transpose(1, 2), offs=ends), order.position, weights)
