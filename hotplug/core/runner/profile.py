"""Steps that stand for all others at start: the largest that the configuration allows, run so that their workspaces
exist when memory is measured, and what kernels are compiled for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from hotplug.core.request import SamplingParams
from hotplug.core.runner.runner import Runner
from hotplug.core.scheduler.plan import Admission, StepPlan

_SHORTEST, _TIMES = 16, 4
"""Tokens of the shortest prompt that is tried, and how much longer the next is."""


def run_largest_steps(
    runner: Runner, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, max_verified: int
) -> None:
    """Run the steps with the largest workspaces, one after the other."""
    for plan in largest_steps(max_num_seqs, max_num_batched_tokens, max_model_len, max_verified):
        runner.execute(plan).result()


def largest_steps(
    max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, max_verified: int
) -> Iterator[StepPlan]:
    """As many rows as may run, one row of the whole token budget, and one that verifies, unless `max_verified` is 0.

    Their keys and values go to the null block.
    """
    rows = min(max_num_seqs, max_num_batched_tokens)
    yield _prefill(rows, min(max_num_batched_tokens // rows, max_model_len))
    yield _prefill(1, min(max_num_batched_tokens, max_model_len))
    if max_verified:
        tokens = min(max_verified, max_num_batched_tokens, max_model_len)
        plan = _prefill(1, tokens)
        admitted = [dataclasses.replace(one, num_prompt_tokens=1) for one in plan.admitted]  # the rest is output
        yield dataclasses.replace(plan, admitted=admitted, num_verifies=1, drafts=np.zeros(tokens, np.int32))


def prompt_steps(max_num_batched_tokens: int, max_model_len: int) -> Iterator[StepPlan]:
    """Prompts alone, short ones first: kernels may differ with the number of tokens."""
    tokens = _SHORTEST
    while tokens < min(max_num_batched_tokens, max_model_len):
        yield _prefill(1, tokens)
        tokens *= _TIMES


def _prefill(rows: int, num_tokens: int) -> StepPlan:
    """A step that prefills `num_tokens` in each of `rows` rows."""
    empty = np.zeros(0, np.int32)
    params = SamplingParams(temperature=1.0, top_p=0.9)  # the sampling path with the largest workspace
    tokens = np.zeros(num_tokens, np.int32)
    return StepPlan(
        rows=np.arange(rows, dtype=np.int32),
        start=np.zeros(rows, np.int32),
        num_tokens=np.full(rows, num_tokens, np.int32),
        samples=np.ones(rows, bool),
        num_decodes=0,
        released=empty,
        admitted=[Admission(row, tokens, num_tokens, params, seed=0, eos_token_ids=()) for row in range(rows)],
        block_tables=empty,
        block_rows=empty,
        block_cols=empty,
        block_ids=empty,
    )
