"""A profile step: the largest that the configuration allows, run so that its workspaces exist when memory is
measured."""

from __future__ import annotations

import numpy as np

from hotplug.core.request import SamplingParams
from hotplug.core.runner.runner import Runner
from hotplug.core.scheduler.plan import Admission, StepPlan


def run_largest_step(runner: Runner, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> None:
    """Run a step that fills the token budget over as many rows as may run; its KV goes to the null block."""
    rows = min(max_num_seqs, max_num_batched_tokens)
    share = min(max_num_batched_tokens // rows, max_model_len)
    empty = np.zeros(0, np.int32)
    params = SamplingParams(temperature=1.0, top_p=0.9)  # the sampling path with the largest workspace
    admitted = [
        Admission(row, np.zeros(share, np.int32), share, params, seed=0, eos_token_ids=()) for row in range(rows)
    ]
    plan = StepPlan(
        rows=np.arange(rows, dtype=np.int32),
        start=np.zeros(rows, np.int32),
        num_tokens=np.full(rows, share, np.int32),
        samples=np.ones(rows, bool),
        num_decodes=0,
        released=empty,
        admitted=admitted,
        block_rows=empty,
        block_cols=empty,
        block_ids=empty,
    )
    runner.execute(plan).result()
