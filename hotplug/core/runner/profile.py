"""A profile step: the largest that the configuration allows, run so that its workspaces exist when memory is
measured."""

from __future__ import annotations

import numpy as np

from hotplug.core.request import SamplingParams
from hotplug.core.runner.runner import Runner
from hotplug.core.scheduler.plan import Admission, StepPlan


def run_largest_steps(runner: Runner, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> None:
    """Run the steps with the largest workspaces: as many rows as may run, and one row of the whole token budget.

    Their keys and values go to the null block.
    """
    rows = min(max_num_seqs, max_num_batched_tokens)
    runner.execute(_prefill(rows, min(max_num_batched_tokens // rows, max_model_len))).result()
    runner.execute(_prefill(1, min(max_num_batched_tokens, max_model_len))).result()


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
        block_rows=empty,
        block_cols=empty,
        block_ids=empty,
    )
