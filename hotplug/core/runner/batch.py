"""The persistent batch: what the device must know of every running request, kept between steps.

Indexed by row (see `hotplug.core.scheduler.plan`). A step changes it by differences: rows admitted, block
table entries added, last tokens overwritten on the device by the sampler.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hotplug.core.ops.attention import AttentionInputs
from hotplug.core.ops.inputs import StepInputs
from hotplug.core.ops.plan import Plan
from hotplug.core.scheduler.plan import Admission, StepPlan


class Batch:
    """Owns token histories (host), block tables and last tokens (device)."""

    def __init__(
        self,
        plan: Plan,
        *,
        max_rows: int,
        max_len: int,
        block_size: int,
        index_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._prepare = plan.bind("prepare_inputs", "inputs", "int", block_size=block_size)
        self._block_size = block_size
        self._index_dtype = index_dtype
        self._index_type = np.int32 if index_dtype is torch.int32 else np.int64
        self._device = device
        # Lazily paged: only rows that hold long sequences cost memory.
        self.tokens = np.zeros((max_rows, max_len), np.int32)
        self.num_prompt_tokens = np.zeros(max_rows, np.int32)
        max_blocks = -(-max_len // block_size)
        self.block_tables = torch.zeros((max_rows, max_blocks), dtype=index_dtype, device=device)
        self.last_tokens = torch.zeros(max_rows, dtype=index_dtype, device=device)

    def admit(self, admission: Admission) -> None:
        row, tokens = admission.row, admission.token_ids
        self.tokens[row, : len(tokens)] = tokens
        self.num_prompt_tokens[row] = admission.num_prompt_tokens

    def update_tables(self, plan: StepPlan) -> None:
        """Apply the step's new block table entries."""
        if len(plan.block_rows):
            rows, cols, ids = (self.upload(a) for a in (plan.block_rows, plan.block_cols, plan.block_ids))
            self.block_tables[rows, cols] = ids

    def inputs(self, plan: StepPlan) -> StepInputs:
        """The device inputs of a step."""
        query_start = np.zeros(len(plan.rows) + 1, np.int64)
        np.cumsum(plan.num_tokens, out=query_start[1:])
        seq_lens = plan.start + plan.num_tokens
        longest = int(seq_lens.max())

        rows, starts = self.upload(plan.rows), self.upload(query_start)
        token_ids, positions, slots, lens = self._prepare(
            self.upload(self._host_tokens(plan, query_start)),
            rows,
            starts,
            self.upload(plan.start),
            self.last_tokens,
            self.block_tables,
            self._block_size,
        )
        attention = AttentionInputs(
            block_table=self.block_tables[rows, : -(-longest // self._block_size)],
            query_start=starts,
            seq_lens=lens,
            query_lens_host=plan.num_tokens.tolist(),
            seq_lens_host=seq_lens.tolist(),
            num_decodes=plan.num_decodes,
            max_query_len=int(plan.num_tokens.max()),
            max_seq_len=longest,
        )
        last = self.upload(query_start[1:][plan.samples] - 1)
        return StepInputs(token_ids, positions, slots, attention, last)

    def _host_tokens(self, plan: StepPlan, query_start: np.ndarray) -> np.ndarray:
        """[T] token ids; -1 where only the device knows the value. Loops over prompt chunks, never decodes."""
        token_ids = np.full(query_start[-1], -1, np.int64)
        for i in range(plan.num_decodes, len(plan.rows)):
            row, start = plan.rows[i], plan.start[i]
            token_ids[query_start[i] : query_start[i + 1]] = self.tokens[row, start : start + plan.num_tokens[i]]
        return token_ids

    def upload(self, values: np.ndarray) -> Tensor:
        """A host array as an index tensor on the device. Does not wait for what the device is at."""
        values = values.astype(self._index_type)  # here, so that the device need not convert; also a copy to send
        return torch.from_numpy(values).to(self._device, non_blocking=True)
