"""The contract between the scheduler and the runner: what one step computes.

A *row* is a request's index in the persistent batch, given by the scheduler at admission and kept until the
request ends or is preempted. Both sides keep their state in arrays indexed by row, so a steady decode step
is described by a few small arrays and nothing per request.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hotplug.core.logprobs import Columns, TokenLogprobs
from hotplug.core.request import SamplingParams

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that enters the batch in this step (new, or back after preemption)."""

    row: int
    token_ids: IntArray
    """Prompt and, after preemption, the tokens generated so far."""
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    """64-bit seed of the request's random numbers; with the index of the output token it fixes the draw."""
    eos_token_ids: tuple[int, ...]
    """Tokens that `min_tokens` holds back, with `sampling.stop_token_ids`."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Arrays of length R run over the scheduled requests: decodes, verifications, then prompt chunks.

    The runner applies it in this order: `saves`, `swap_out`, `swap_in`, `loads`, `released`, `admitted`, new blocks,
    then the forward pass over positions [start, start + num_tokens) of each row. Key and value of every token in the
    step are written before any query of the step reads them (layer by layer), so a request may share blocks that
    another one fills in the same step.
    """

    rows: IntArray
    """[R] batch rows."""
    start: IntArray
    """[R] position of the first token each row computes, i.e. tokens whose KV is already there."""
    num_tokens: IntArray
    """[R] tokens each row computes."""
    samples: BoolArray
    """[R] whether the row's last token yields a new token (false for a prompt chunk that is not the last). In a
    verification every token yields one."""
    num_decodes: int
    """Leading entries whose one input token is the row's last sampled token. Where the plan is unrolled, the last of
    them have a token of `drafts` each instead."""
    released: IntArray
    """Rows that were freed since the last plan."""
    admitted: list[Admission]
    block_tables: IntArray
    """[B] with `block_rows`, `block_cols` and `block_ids`: cells of the block tables that change in this step. Which
    tables belong to which KV group is the same for the engine's life (`hotplug.core.kv.groups`)."""
    block_rows: IntArray
    block_cols: IntArray
    block_ids: IntArray
    saves: list[tuple[int, bytes]] = field(default_factory=list)
    """Blocks that earlier steps filled, with their hashes, for the KV connector; before anything is written."""
    loads: list[tuple[int, Any]] = field(default_factory=list)
    """Blocks that the KV connector fetched, each with its host tensor; written before the forward pass."""
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    """(device block, host block) to copy to the host, each host block once. The device blocks may be written by this
    very step, so they are copied before anything is."""
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    """(device block, host block) to copy to the device, each device block once. A source may be a target of
    `swap_out` in the same plan; a later plan may write it."""
    num_verifies: int = 0
    """Entries after the decodes that verify proposals: their tokens are the row's last one and what was proposed to
    follow it. A row is in no further plan before the result of its verification is known."""
    drafts: IntArray = field(default_factory=lambda: np.empty(0, np.int32))
    """The input tokens of the verifications, one after the other."""

    @property
    def total_tokens(self) -> int:
        return int(self.num_tokens.sum())

    @property
    def verifies(self) -> range:
        """The entries that verify proposals."""
        return range(self.num_decodes, self.first_chunk)

    @property
    def first_chunk(self) -> int:
        """The first entry that is a prompt chunk."""
        return self.num_decodes + self.num_verifies

    def unrolled(self) -> StepPlan:
        """The same step with each token of a verification as an entry of its own, after the decodes and counted as one.

        That is how it is computed: a row then occurs as often as it has tokens, one position after the other.
        """
        if not self.num_verifies:
            return self
        counts = np.ones(len(self.rows), np.int32)
        counts[self.num_decodes : self.first_chunk] = self.num_tokens[self.num_decodes : self.first_chunk]
        of = np.repeat(np.arange(len(self.rows)), counts)
        num_tokens = np.where(counts > 1, 1, self.num_tokens)
        offset = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
        return replace(
            self,
            rows=self.rows[of],
            start=self.start[of] + offset.astype(np.int32),
            num_tokens=num_tokens[of],
            samples=self.samples[of],
            num_decodes=self.num_decodes + len(self.drafts),
            num_verifies=0,
        )


@dataclass(slots=True)
class StepResult:
    """What a step returned to the host, in the plan's order."""

    token_ids: IntArray
    """[R] the last sampled token of each row, `NO_TOKEN` where there is none; undefined
    where `plan.samples` is false."""
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """By row: log-probabilities of the sampled tokens, for rows that asked."""
    prompt_logprobs: dict[int, Columns] = field(default_factory=dict)
    """By row: log-probabilities of prompt tokens start+1 .. of this chunk, for rows that asked."""
    verified: dict[int, list[int]] = field(default_factory=dict)
    """By row, for verifications: the proposals that were accepted and the token sampled after them."""
