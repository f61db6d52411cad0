"""Input preparation on the device: from a step's few host arrays to tokens, positions and cache slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hotplug.core.ops.attention import AttentionInputs
from hotplug.core.ops.registry import Bind, Fn, Op, SiteSpec


@dataclass(slots=True)
class StepInputs:
    """Everything a model's forward pass reads, on the device. T tokens of R requests."""

    token_ids: Tensor
    """[T]"""
    positions: Tensor
    """[T]"""
    slots: tuple[Tensor, ...]
    """By block table (`core.kv.groups`): [T] where each token's key and value go, page * block_size + offset."""
    attention: tuple[AttentionInputs, ...]
    """By block table."""
    logit_indices: Tensor
    """[S] which of the T tokens need vocabulary scores."""
    scored: tuple[AttentionInputs, ...] | None = None
    """The queries of the S tokens alone, by block table, where nothing wants the hidden states of the others: then the
    last layer computes no more than their keys and values, and the model returns S hidden states."""


def prepare_inputs(
    token_ids: Tensor,
    rows: Tensor,
    query_start: Tensor,
    start: Tensor,
    last_tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Complete a step's inputs from the persistent batch.

    token_ids: [T] from the host; -1 takes the row's last sampled token, which only the device knows. Where there was
    none (`NO_TOKEN`), any token of the vocabulary will do, here 0: the request has ended by then.
    rows: [R] batch rows; query_start: [R + 1]; start: [R] first position of each.
    last_tokens: [max_rows]; block_tables: [max_rows, max_blocks].
    Returns token_ids [T], positions [T], slots [T] and seq_lens [R], in the index dtype of `start`.
    """
    index = torch.arange(token_ids.shape[0], device=token_ids.device, dtype=query_start.dtype)
    request = torch.searchsorted(query_start[1:], index, right=True, out_int32=index.dtype is torch.int32)
    row = rows[request]
    positions = start[request] + index - query_start[request]
    block = block_tables[row, positions // block_size]
    slots = block * block_size + positions % block_size
    tokens = torch.where(token_ids < 0, last_tokens[row].clamp(min=0), token_ids)
    return tokens, positions, slots, start + query_start.diff()


def prepare_step(
    token_ids: Tensor,
    rows: Tensor,
    query_start: Tensor,
    start: Tensor,
    last_tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
    num_blocks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`prepare_inputs`, and the first `num_blocks` entries of each row's block table [R, num_blocks]."""
    prepared = prepare_inputs(token_ids, rows, query_start, start, last_tokens, block_tables, block_size)
    return *prepared, block_tables[rows, :num_blocks]


def lower_prepare_step(bind: Bind, spec: SiteSpec) -> Fn:
    prepare = bind("prepare_inputs", "tokens", block_size=spec["block_size"])

    def composed(
        token_ids: Tensor,
        rows: Tensor,
        query_start: Tensor,
        start: Tensor,
        last_tokens: Tensor,
        block_tables: Tensor,
        num_blocks: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        prepared = prepare(token_ids, rows, query_start, start, last_tokens, block_tables)
        return *prepared, block_tables[rows, :num_blocks]

    return composed


OPS = (
    Op("prepare_inputs", prepare_inputs, facts=("block_size",)),
    Op("prepare_step", prepare_step, facts=("block_size",), lower=lower_prepare_step),
)
