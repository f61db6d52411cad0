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
from hotplug.core.runner.schema import step_schema, to_tensors


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

    def __init__(
        self, shape: StepShape, *, num_tables: int, max_blocks: int, index_dtype: torch.dtype, device: torch.device
    ) -> None:
        def ints(*size: int) -> Tensor:
            return torch.zeros(size, dtype=index_dtype, device=device)

        tokens, requests = shape
        self.shape = shape
        seq_lens = ints(requests) + 1
        self.query_start = torch.arange(requests + 1, dtype=index_dtype, device=device)
        self.inputs = StepInputs(
            token_ids=ints(tokens),
            positions=ints(tokens),
            slots=tuple(ints(tokens) for _ in range(num_tables)),
            attention=tuple(
                AttentionInputs(
                    block_table=ints(requests, max_blocks),
                    query_start=self.query_start,
                    seq_lens=seq_lens,
                    query_lens_host=None,
                    seq_lens_host=None,
                    num_decodes=requests if shape.decodes else 0,
                    max_query_len=1 if shape.decodes else tokens,
                    max_seq_len=0,
                )
                for _ in range(num_tables)
            ),
            logit_indices=ints(requests),
        )
        self.schema = step_schema(num_tables)
        self.tensors = to_tensors(self.inputs)

    @property
    def max_query_len(self) -> int:
        return self.inputs.attention[0].max_query_len

    @property
    def examples(self) -> tuple[Tensor, ...]:
        """What a program of this shape is traced with."""
        return self.tensors

    def arguments(self, step: StepInputs) -> tuple[Tensor, ...]:
        """The tensors, with a step filled in."""
        self.fill(step)
        return self.tensors

    def fill(self, step: StepInputs) -> None:
        """Copy a step's inputs in, and padding behind them."""
        own = self.inputs
        for target, source in (
            (own.token_ids, step.token_ids),
            (own.positions, step.positions),
            *zip(own.slots, step.slots, strict=True),
            (own.logit_indices, step.logit_indices),
        ):
            target[: len(source)] = source
            target[len(source) :] = 0
        for padded, given in zip(own.attention, step.attention, strict=True):
            requests, blocks = given.block_table.shape
            # Columns past a request's blocks keep old ids: the mask hides what they point to.
            padded.block_table[:requests, :blocks] = given.block_table
            padded.block_table[requests:] = 0
        first = step.attention[0]
        requests = len(first.seq_lens)
        own.attention[0].seq_lens[:requests] = first.seq_lens
        own.attention[0].seq_lens[requests:] = 1
        if not self.shape.decodes:
            self.query_start[: requests + 1] = first.query_start
            self.query_start[requests + 1 :] = len(step.token_ids)
