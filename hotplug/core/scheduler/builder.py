"""A step plan under construction: decodes as arrays, verifications and prefills one by one."""

from __future__ import annotations

from typing import Any

import numpy as np

from hotplug.core.kv.manager import TableChanges
from hotplug.core.scheduler.plan import Admission, IntArray, StepPlan


class StepBuilder:
    """Gathers what a step computes; `build` makes the plan."""

    def __init__(self, decode_rows: IntArray, decode_start: IntArray) -> None:
        """[n] int32 rows whose one input token is their last sampled one, and its position."""
        self._decode_rows = decode_rows
        self._decode_start = decode_start
        self._rows: list[int] = []
        self._start: list[int] = []
        self._num_tokens: list[int] = []
        self._samples: list[bool] = []
        self._num_verifies = 0
        self._drafts: list[IntArray] = []
        self.num_tokens = len(decode_rows)
        """Tokens of the budget used so far."""
        self.num_scored = len(decode_rows)
        """Requests so far, a verification counted once for each of its tokens: what makes the step's scores."""
        self.chunk_tokens = 0
        """Tokens of prompt chunks so far."""
        self.admitted: list[Admission] = []
        self.loads: list[tuple[int, Any]] = []
        self.swap_in: list[tuple[int, int]] = []

    @property
    def num_chunks(self) -> int:
        return len(self._rows) - self._num_verifies

    @property
    def has_prefill(self) -> bool:
        return self.num_chunks > 0

    def add_verification(self, row: int, start: int, tokens: IntArray) -> None:
        """A row's last token, at position `start`, and proposals: [k + 1] `tokens`. Before the first chunk."""
        self._drafts.append(tokens)
        self._num_verifies += 1
        self._add(row, start, len(tokens), samples=True)
        self.num_scored += len(tokens)

    def add_chunk(self, row: int, start: int, end: int, *, last: bool) -> None:
        """Positions [start, end) of a row's prefill; the `last` chunk samples a token."""
        self._add(row, start, end - start, samples=last)
        self.chunk_tokens += end - start
        self.num_scored += 1

    def _add(self, row: int, start: int, num_tokens: int, *, samples: bool) -> None:
        self._rows.append(row)
        self._start.append(start)
        self._num_tokens.append(num_tokens)
        self._samples.append(samples)
        self.num_tokens += num_tokens

    def build(
        self,
        released: list[int],
        changes: TableChanges,
        saves: list[tuple[int, bytes]],
        swap_out: list[tuple[int, int]],
    ) -> StepPlan:
        """The plan, with the rows freed before it, the cells of block tables that change (tables, rows, columns, ids),
        and the copies that go before all it writes."""
        n = len(self._decode_rows)
        rows, start = self._decode_rows, self._decode_start
        num_tokens, samples = np.ones(n, np.int32), np.ones(n, np.bool_)
        if self._rows:
            rows = np.concatenate((rows, np.array(self._rows, np.int32)))
            start = np.concatenate((start, np.array(self._start, np.int32)))
            num_tokens = np.concatenate((num_tokens, np.array(self._num_tokens, np.int32)))
            samples = np.concatenate((samples, np.array(self._samples, np.bool_)))
        return StepPlan(
            rows=rows,
            start=start,
            num_tokens=num_tokens,
            samples=samples,
            num_decodes=n,
            released=np.array(released, np.int32),
            admitted=self.admitted,
            block_tables=changes[0],
            block_rows=changes[1],
            block_cols=changes[2],
            block_ids=changes[3],
            saves=saves,
            loads=self.loads,
            swap_out=swap_out,
            swap_in=self.swap_in,
            num_verifies=self._num_verifies,
            drafts=np.concatenate(self._drafts) if self._drafts else np.empty(0, np.int32),
        )
