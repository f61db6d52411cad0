"""A step's inputs from the persistent batch in one launch, and rows of the embedding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hotplug.platforms.cuda.kernels import pdl

TOKENS = 128
"""Tokens of a program."""
COLUMNS = 1024
"""Block table entries of a program."""
SIZES = ["num_tokens", "requests", "num_blocks", "max_blocks", "search_steps", "token_programs", "column_programs"]
"""What varies from step to step, and must not be compiled for."""


@triton.jit(do_not_specialize=[*SIZES, "token_ids", "rows", "query_start", "start"])
def _prepare(token_ids, rows, query_start, start, last_tokens, block_tables, tokens, positions, slots, seq_lens, table,
             num_tokens, requests, num_blocks, max_blocks, table_stride, search_steps, token_programs, column_programs,
             BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The first programs take tokens, the others a request's length and a stretch of its block table each."""
    program = tl.program_id(0)
    pdl.release(PDL)
    pdl.wait(PDL)
    if program < token_programs:
        token = program * TOKENS + tl.arange(0, TOKENS)
        own = token < num_tokens
        low, high = tl.zeros([TOKENS], tl.int32), tl.zeros([TOKENS], tl.int32) + (requests - 1)
        for _ in range(search_steps):  # the first request that ends beyond the token; padding falls to the last
            middle = (low + high) // 2
            beyond = tl.load(query_start + middle + 1) > token
            high, low = tl.where(beyond, middle, high), tl.where(beyond, low, tl.minimum(middle + 1, high))
        row = tl.load(rows + high).to(tl.int64)
        position = tl.load(start + high) + token - tl.load(query_start + high)
        column = position // BLOCK_SIZE
        block = tl.load(block_tables + row * table_stride + column, mask=own & (column < max_blocks), other=0)
        given = tl.load(token_ids + token, mask=own, other=0)
        tl.store(tokens + token, tl.where(given < 0, tl.maximum(tl.load(last_tokens + row), 0), given), mask=own)
        tl.store(positions + token, position, mask=own)
        tl.store(slots + token, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=own)
    else:
        request = (program - token_programs) // column_programs
        first = (program - token_programs) % column_programs * COLUMNS
        if first == 0:
            query = tl.load(query_start + request + 1) - tl.load(query_start + request)
            tl.store(seq_lens + request, tl.load(start + request) + query)
        entry = first + tl.arange(0, COLUMNS)
        inside = entry < num_blocks
        source = block_tables + tl.load(rows + request).to(tl.int64) * table_stride
        target = table + request.to(tl.int64) * num_blocks
        tl.store(target + entry, tl.load(source + entry, mask=inside), mask=inside)


def prepare_step(
    token_ids: Tensor,
    rows: Tensor,
    query_start: Tensor,
    start: Tensor,
    last_tokens: Tensor,
    block_tables: Tensor,
    num_blocks: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Index tensors of one dtype, int32 or int64. Tokens beyond the last query get slots in block 0."""
    num_tokens, requests = len(token_ids), len(rows)
    tokens, positions, slots = (torch.empty_like(token_ids) for _ in range(3))
    seq_lens, table = torch.empty_like(start), block_tables.new_empty((requests, num_blocks))
    if requests:
        token_programs = triton.cdiv(num_tokens, TOKENS)
        column_programs = max(triton.cdiv(num_blocks, COLUMNS), 1)
        _prepare[(token_programs + requests * column_programs,)](
            token_ids, rows, query_start, start, last_tokens, block_tables, tokens, positions, slots, seq_lens, table,
            num_tokens, requests, num_blocks, block_tables.shape[1], block_tables.stride(0), requests.bit_length(),
            token_programs, column_programs, BLOCK_SIZE=block_size, TOKENS=TOKENS, COLUMNS=COLUMNS, num_warps=4,
            **pdl.options(start.device),
        )  # fmt: skip
    return tokens, positions, slots, seq_lens, table


@triton.jit(do_not_specialize=["token_ids"])
def _embed(token_ids, weight, out, weight_stride, hidden, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """A program a token and stretch of its row."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pdl.release(PDL)
    pdl.wait(PDL)
    source = weight + tl.load(token_ids + token).to(tl.int64) * weight_stride
    tl.store(out + token * hidden + column, tl.load(source + column, mask=column < hidden), mask=column < hidden)


def embed(token_ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight` [vocab, hidden], dense in the last dimension."""
    tokens, hidden = len(token_ids), weight.shape[1]
    out = torch.empty((tokens, hidden), dtype=weight.dtype, device=weight.device)
    if tokens:
        block = min(triton.next_power_of_2(hidden), 2048)
        _embed[(tokens, triton.cdiv(hidden, block))](token_ids, weight, out, weight.stride(0), hidden, BLOCK=block,
                                                     num_warps=4, **pdl.options(weight.device))  # fmt: skip
    return out
