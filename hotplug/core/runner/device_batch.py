"""The persistent batch: what the device must know of every running request, kept between steps.

Indexed by row (see `hotplug.core.scheduler.plan`). A step changes it by differences: rows admitted, block
table entries added, last tokens overwritten on the device by the sampler. One row more than requests may have is
the spare: its block table is all null blocks, and what pads a step of static shape belongs to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hotplug.core.ops.attention import AttentionInputs
from hotplug.core.ops.inputs import StepInputs
from hotplug.core.ops.plan import Plan
from hotplug.core.scheduler.plan import Admission, StepPlan

Pin = Callable[[Sequence[int], torch.dtype], Tensor]
"""Makes a host tensor that the device copies from asynchronously (`HasRuntime.pinned`)."""
Ints = npt.NDArray[np.integer]

_ALIGNED = 4
"""Elements, at least 16 bytes."""
_STAGED = 32
"""Host tensors kept while the device may still copy from them: more than two steps in flight send."""


class Region:
    """Named arrays of the index dtype that go to fixed places on the device in one copy.

    Fill them by name and `send`; `begin` gives fresh host memory where the device may still copy from the last.
    """

    def __init__(self, batch: DeviceBatch, sizes: Mapping[str, int]) -> None:
        self._batch = batch
        ends = list(accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes.values()))
        self._spans = dict(zip(sizes, zip([0, *ends[:-1]], sizes.values(), strict=True), strict=True))
        self._device = torch.zeros(ends[-1], dtype=batch.index_dtype, device=batch.device)
        self.on_device = {name: self._device.narrow(0, *span) for name, span in self._spans.items()}
        self._staged: Tensor
        self._values: npt.NDArray[Any]
        self.begin()

    def begin(self) -> None:
        self._staged = self._batch.stage(self._device.shape)
        self._values = self._staged.numpy()

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        begin, size = self._spans[name]
        return self._values[begin : begin + size]

    def send(self) -> None:
        """Copy to the device, without waiting for it."""
        self._device.copy_(self._staged, non_blocking=True)


class DeviceBatch:
    """Owns token histories (host), block tables and last tokens (device)."""

    def __init__(
        self,
        plan: Plan,
        *,
        max_rows: int,
        max_len: int,
        block_size: int,
        num_tables: int = 1,
        index_dtype: torch.dtype,
        device: torch.device,
        pin: Pin | None = None,
    ) -> None:
        self._prepare = plan.bind("prepare_step", "inputs", "int", block_size=block_size)
        self._block_size = block_size
        self.index_dtype = index_dtype
        self._index_type = np.int32 if index_dtype is torch.int32 else np.int64
        self.device = device
        self._pin = pin
        self._staged: deque[Tensor] = deque(maxlen=_STAGED)
        # Lazily paged: only rows that hold long sequences cost memory.
        self.tokens = np.zeros((max_rows, max_len), np.int32)
        self.num_prompt_tokens = np.zeros(max_rows, np.int32)
        self.spare_row = max_rows
        self.max_blocks = -(-max_len // block_size)
        self.block_tables = torch.zeros((num_tables, max_rows + 1, self.max_blocks), dtype=index_dtype, device=device)
        """[num_tables, rows, max_blocks] page ids (`hotplug.core.kv.groups`)."""
        self._tables = self.block_tables.unbind()
        self._cells = self.block_tables.view(-1)
        """The entries of all block tables, one after the other."""
        self.last_tokens = torch.zeros(max_rows + 1, dtype=index_dtype, device=device)

    def admit(self, admission: Admission) -> None:
        row, tokens = admission.row, admission.token_ids
        self.tokens[row, : len(tokens)] = tokens
        self.num_prompt_tokens[row] = admission.num_prompt_tokens

    def update_tables(self, plan: StepPlan) -> None:
        """Apply the step's new block table entries: before a step whose inputs are made on the device alone."""
        if len(plan.block_rows):
            cells, ids = self.upload(self._changed(plan), plan.block_ids)
            self._cells.index_put_((cells,), ids)

    def _changed(self, plan: StepPlan) -> Ints:
        """[B] positions in `_cells` of the step's new block table entries."""
        rows = plan.block_tables.astype(np.int64) * (self.spare_row + 1) + plan.block_rows
        return rows * self.max_blocks + plan.block_cols

    def inputs(self, plan: StepPlan, *, scored_only: bool = False) -> StepInputs:
        """The device inputs of an unrolled step, whose new block table entries go to the device in the same copy.

        `scored_only`: nobody wants hidden states of tokens without scores.
        """
        query_start = np.zeros(len(plan.rows) + 1, np.int64)
        np.cumsum(plan.num_tokens, out=query_start[1:])
        seq_lens = plan.start + plan.num_tokens
        longest = int(seq_lens.max())
        samples = np.flatnonzero(plan.samples)
        every = len(samples) == len(plan.rows)
        sent: list[Ints] = [
            self._host_tokens(plan, query_start), plan.rows, query_start, plan.start, query_start[samples + 1] - 1
        ]  # fmt: skip
        scored_alone = scored_only and len(samples) < query_start[-1]
        if scored_alone:
            sent += (np.arange(len(samples) + 1), samples[:0] if every else samples)
        if len(plan.block_rows):
            sent += (self._changed(plan), plan.block_ids)
        host_tokens, rows, starts, first, last, *more = self.upload(*sent)
        if len(plan.block_rows):
            *more, cells, ids = more
            self._cells.index_put_((cells,), ids)
        token_ids, positions, slots, lens, tables = self._prepared(
            host_tokens, rows, starts, first, -(-longest // self._block_size)
        )
        query_lens_host, seq_lens_host = plan.num_tokens.tolist(), seq_lens.tolist()
        max_query_len = int(plan.num_tokens.max())
        attention = tuple(
            AttentionInputs(
                block_table=table,
                query_start=starts,
                seq_lens=lens,
                query_lens_host=query_lens_host,
                seq_lens_host=seq_lens_host,
                num_decodes=plan.num_decodes,
                max_query_len=max_query_len,
                max_seq_len=longest,
            )
            for table in tables
        )
        scored = None
        if scored_alone:
            ones, which = more
            if not every:
                tables, lens = [table[which] for table in tables], lens[which]
            scored = self._one_query_each(tables, ones, lens, seq_lens[samples])
        return StepInputs(token_ids, positions, slots, attention, last, scored)

    def _prepared(
        self, given: Tensor, rows: Tensor, query_start: Tensor, start: Tensor, num_blocks: int
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor, list[Tensor]]:
        """Token ids, positions, slots by block table, sequence lengths, and the rows' block tables."""
        first, *others = (
            self._prepare(given, rows, query_start, start, self.last_tokens, table, num_blocks)
            for table in self._tables
        )
        token_ids, positions, slots, lens, table = first
        return token_ids, positions, (slots, *(o[2] for o in others)), lens, [table, *(o[4] for o in others)]

    def _one_query_each(
        self, tables: Sequence[Tensor], query_start: Tensor, lens: Tensor, lens_host: Ints
    ) -> tuple[AttentionInputs, ...]:
        """What the S scored tokens of a step see, by block table: as many decodes."""
        count, longest = len(lens_host), int(lens_host.max(initial=1))
        host = lens_host.tolist()
        return tuple(
            AttentionInputs(
                block_table=table,
                query_start=query_start,
                seq_lens=lens,
                query_lens_host=[1] * count,
                seq_lens_host=host,
                num_decodes=count,
                max_query_len=1,
                max_seq_len=longest,
            )
            for table in tables
        )

    def decodes(self, rows: Tensor, start: Tensor, given: Tensor, query_start: Tensor) -> StepInputs:
        """The inputs of a step of static shape with one token an entry, made on the device alone.

        rows, start: [R]; `given` [R] is -1 where the token is the row's last; `query_start` counts from 0 to R.
        """
        return self.mixed(rows, start, given, query_start, query_start[:-1], num_decodes=len(rows), max_query_len=1)

    def mixed(
        self, rows: Tensor, start: Tensor, given: Tensor, query_start: Tensor, scored: Tensor, *, num_decodes: int,
        max_query_len: int,
    ) -> StepInputs:  # fmt: skip
        """The inputs of a step of static shape, prompt chunks after `num_decodes` decodes, made on the device alone.

        rows, start: [R]; `given` [T] is -1 where the token is the row's last; query_start: [R + 1], the last one T;
        scored: [S] tokens that get scores.
        """
        token_ids, positions, slots, lens, tables = self._prepared(given, rows, query_start, start, self.max_blocks)
        attention = tuple(
            AttentionInputs(
                block_table=table,
                query_start=query_start,
                seq_lens=lens,
                query_lens_host=None,
                seq_lens_host=None,
                num_decodes=num_decodes,
                max_query_len=max_query_len,
                max_seq_len=0,
            )
            for table in tables
        )
        return StepInputs(token_ids, positions, slots, attention, scored)

    def _host_tokens(self, plan: StepPlan, query_start: np.ndarray) -> np.ndarray:
        """[T] token ids; -1 where only the device knows the value. Loops over prompt chunks, never decodes."""
        token_ids = np.full(query_start[-1], -1, np.int64)
        token_ids[plan.num_decodes - len(plan.drafts) : plan.num_decodes] = plan.drafts
        for i in range(plan.num_decodes, len(plan.rows)):
            row, start = plan.rows[i], plan.start[i]
            token_ids[query_start[i] : query_start[i + 1]] = self.tokens[row, start : start + plan.num_tokens[i]]
        return token_ids

    def upload(self, *arrays: Ints) -> tuple[Tensor, ...]:
        """Host arrays of one dimension as index tensors on the device, in one copy that does not wait for it.

        Each begins at a multiple of `_ALIGNED` elements, whatever the lengths: kernels may be compiled for alignment.
        """
        sizes: list[int] = []  # of the arrays, and of the gap after each
        for array in arrays:
            sizes += (len(array), -len(array) % _ALIGNED)
        staged = self.stage((sum(sizes),))
        host, begin = staged.numpy(), 0
        for i, array in enumerate(arrays):
            host[begin : begin + len(array)] = array
            begin += sizes[2 * i] + sizes[2 * i + 1]
        return staged.to(self.device, non_blocking=True).split_with_sizes(sizes)[::2]

    def stage(self, shape: Sequence[int]) -> Tensor:
        """An uninitialized host tensor of the index dtype, to be filled and sent to the device before long."""
        if self._pin is None:
            return torch.empty(tuple(shape), dtype=self.index_dtype)
        staged = self._pin(shape, self.index_dtype)
        self._staged.append(staged)
        return staged
