"""Steps of static shape: fixed input tensors that a step's inputs are padded into, so that a recorded or
compiled step can be run again.

What padding computes is thrown away: it belongs to no request and writes to the null block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hotplug.core.ops.attention import AttentionInputs
from hotplug.core.ops.inputs import StepInputs


class StepShape(NamedTuple):
    """The size of a static step. Equal numbers mean one token a request: decodes."""

    num_tokens: int
    num_requests: int

    @property
    def decodes(self) -> bool:
        return self.num_tokens == self.num_requests

    def holds(self, tokens: int, requests: int, max_query_len: int) -> bool:
        """Whether a step of so many tokens and requests fits."""
        if self.decodes and max_query_len > 1:
            return False
        return tokens <= self.num_tokens and requests <= self.num_requests


class StaticInputs:
    """The input tensors of one shape, allocated once."""

    def __init__(self, shape: StepShape, *, max_blocks: int, index_dtype: torch.dtype, device: torch.device) -> None:
        def ints(*size: int) -> Tensor:
            return torch.zeros(size, dtype=index_dtype, device=device)

        tokens, requests = shape
        self.shape = shape
        self.query_start = torch.arange(requests + 1, dtype=index_dtype, device=device)
        self.inputs = StepInputs(
            token_ids=ints(tokens),
            positions=ints(tokens),
            slots=ints(tokens),
            attention=AttentionInputs(
                block_table=ints(requests, max_blocks),
                query_start=self.query_start,
                seq_lens=ints(requests) + 1,
                query_lens_host=None,
                seq_lens_host=None,
                num_decodes=requests if shape.decodes else 0,
                max_query_len=1 if shape.decodes else tokens,
                max_seq_len=0,
            ),
            logit_indices=ints(requests),
        )

    @property
    def max_query_len(self) -> int:
        return self.inputs.attention.max_query_len

    @property
    def examples(self) -> tuple[Tensor, ...]:
        """What a program of this shape is traced with."""
        return self.tensors

    def arguments(self, step: StepInputs) -> tuple[Tensor, ...]:
        """The tensors, with a step filled in."""
        self.fill(step)
        return self.tensors

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Token ids, positions, slots, block table, query starts, sequence lengths, logit indices."""
        own, attention = self.inputs, self.inputs.attention
        return (own.token_ids, own.positions, own.slots, attention.block_table, attention.query_start,
                attention.seq_lens, own.logit_indices)  # fmt: skip

    def fill(self, step: StepInputs) -> None:
        """Copy a step's inputs in, and padding behind them."""
        own, attention = self.inputs, step.attention
        for target, source in (
            (own.token_ids, step.token_ids),
            (own.positions, step.positions),
            (own.slots, step.slots),
            (own.logit_indices, step.logit_indices),
        ):
            target[: len(source)] = source
            target[len(source) :] = 0
        requests, blocks = attention.block_table.shape
        # Columns past a request's blocks keep old ids: the mask hides what they point to.
        own.attention.block_table[:requests, :blocks] = attention.block_table
        own.attention.block_table[requests:] = 0
        own.attention.seq_lens[:requests] = attention.seq_lens
        own.attention.seq_lens[requests:] = 1
        if not self.shape.decodes:
            self.query_start[: requests + 1] = attention.query_start
            self.query_start[requests + 1 :] = len(step.token_ids)
