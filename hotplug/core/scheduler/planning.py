"""What the next step computes: who starts, who goes on and how far, and who gives way (see `scheduler`)."""

from __future__ import annotations

import time

import numpy as np

from hotplug.core.scheduler.builder import StepBuilder
from hotplug.core.scheduler.config import ShortPrompts
from hotplug.core.scheduler.plan import IntArray, StepPlan
from hotplug.core.scheduler.residency import Residency
from hotplug.core.scheduler.sequence import Sequence, Status
from hotplug.core.scheduler.speculator import Speculator
from hotplug.core.scheduler.state import InFlight, SchedulerState

PATIENCE = 4
"""Steps of short prompts that new prompts may need before throughput counts for more than the tokens of others."""


class Planner:
    """Makes the plans, and preempts whoever has to give way to them."""

    def __init__(self, state: SchedulerState, residency: Residency, speculator: Speculator) -> None:
        self._state = state
        self._kv = state.kv
        self._config = state.config
        self._batch = state.batch
        self._waiting = state.waiting
        self._prefilling = state.prefilling
        self._stats = state.stats
        self._residency = residency
        self._speculator = speculator
        self._no_bound = ShortPrompts(state.config.max_num_batched_tokens, state.most_scored)
        self._last_was_prefill = False

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run before a request is added or a step in flight is updated."""
        if self._kv.groups.free_blocks_early:
            rows = self._batch.rows()
            self._kv.trim(rows, self._batch.computed[rows])
        self._preempt_for_rank()
        if self._config.mixed_steps:
            return self._plan(decode=True, prefill=True)
        # Prefills and decodes take turns, so neither a stream of new requests nor a long answer starves the other.
        decode = self._last_was_prefill
        return self._plan(decode=decode, prefill=not decode) or self._plan(decode=not decode, prefill=decode)

    def _plan(self, *, decode: bool, prefill: bool) -> StepPlan | None:
        saves = self._residency.take_saves()  # what this step fills is saved before the next one
        bound = self._prompt_bound(decode)
        rows, ends, n, drafts = self._running_work(decode, prefill, bound)
        start = self._batch.computed[rows]
        self._kv.extend(rows, ends)
        builder = StepBuilder(rows[:n], start[:n])
        self._batch.computed[rows[:n]] = ends[:n]
        for row, low, high in zip(rows[n:].tolist(), start[n:].tolist(), ends[n:].tolist(), strict=True):
            if row in drafts:
                self._add_verification(builder, row, drafts[row])
            else:
                self._batch.computed[row] = high
                self._add_chunk(builder, row, low, high)
        if prefill:
            self._admit(builder, bound)
        if not builder.num_tokens:
            self._residency.give_back(saves)
            return None
        plan = builder.build(self._state.released, self._kv.take_changes(), saves, self._kv.take_swap_out())
        self._state.released = []
        self._stats.blocks_swapped_out += len(plan.swap_out)
        self._stats.blocks_swapped_in += len(plan.swap_in)
        self._state.in_flight.append(InFlight(plan, self._batch.generation[plan.rows]))
        self._last_was_prefill = builder.has_prefill
        self._stats.steps += 1
        return plan

    def _prompt_bound(self, decode: bool) -> ShortPrompts:
        """What a step may hold of prompts, within the budget of all."""
        short, batch = self._config.short_prompts, self._batch
        if (
            short is None
            or not decode
            or not self._config.chunked_prefill
            or batch.num_running == len(self._prefilling)
        ):
            return self._no_bound
        waits = sum(int(batch.prefill[row] - batch.computed[row]) for row in self._prefilling)
        waits += self._waiting.tokens_of(batch.num_free)
        return short if waits <= PATIENCE * short.tokens else self._no_bound

    def _running_work(
        self, decode: bool, prefill: bool, bound: ShortPrompts
    ) -> tuple[IntArray, IntArray, int, dict[int, IntArray]]:
        """What running rows do in this step: decodes, verifications, chunks. Preempts until their blocks fit.

        Returns (rows [n], tokens each has computed after the step [n], number of decodes, proposals by row).
        """
        batch = self._batch
        drafts, waiting = self._speculator.draft(len(self._prefilling)) if decode else ({}, [])
        while True:
            rows = batch.decoding() if decode else np.empty(0, np.int32)
            if waiting:
                rows = rows[~np.isin(rows, waiting)]
            num_decodes = len(rows)
            ends = batch.computed[rows] + np.int32(1)
            if prefill and self._prefilling:
                more = sum(map(len, drafts.values()))
                budget = min(self._config.max_num_batched_tokens - num_decodes - more, bound.tokens)
                chunks = []
                for row in self._prefilling[: max(min(self._state.most_scored - num_decodes - more, bound.chunks), 0)]:
                    n = min(budget, int(batch.prefill[row] - batch.computed[row]))
                    if n > 0:
                        budget -= n
                        chunks.append((row, int(batch.computed[row]) + n))
                chunk_rows, chunk_ends = np.array(chunks, np.int32).reshape(-1, 2).T
                rows, ends = np.concatenate((rows, chunk_rows)), np.concatenate((ends, chunk_ends))
            if not self._kv.missing(rows, ends):
                break
            self.preempt(max(batch.running(), key=lambda seq: seq.key))
        if drafts:
            drafts = self._speculator.fit(rows, ends, drafts)
            num_decodes -= len(drafts)
            verifies = np.isin(rows, list(drafts))
            others = np.flatnonzero(~verifies)
            order = np.concatenate((others[:num_decodes], np.flatnonzero(verifies), others[num_decodes:]))
            rows, ends = rows[order], ends[order]
        return rows, ends, num_decodes, drafts

    def _add_verification(self, builder: StepBuilder, row: int, draft: IntArray) -> None:
        """Plan a decode that verifies what may follow. Until the result is known, it counts as one token."""
        batch = self._batch
        start = int(batch.computed[row])
        builder.add_verification(row, start, np.append(batch.history[row, start], draft))
        batch.computed[row] += 1
        batch.verifying[row] = True

    def _admit(self, builder: StepBuilder, bound: ShortPrompts) -> None:
        """Start waiting requests, best first, while rows, budget and blocks last and no prefill is unfinished."""
        self._residency.collect()
        chunk = self._config.max_num_batched_tokens
        while (
            (budget := min(chunk - builder.num_tokens, bound.tokens - builder.chunk_tokens)) > 0
            and builder.num_chunks < bound.chunks
            and not self._prefilling  # it may be about to compute what they share
            and self._batch.num_free
            and builder.num_scored < self._state.most_scored
        ):
            seq = self._waiting.peek()
            if seq is None or seq.in_flight:
                return
            total = len(seq.token_ids)
            prefix, swapped = self._residency.kept(seq)
            if self._residency.begin_fetch(seq, prefix, swapped):
                self._residency.collect()
                continue
            cached = prefix.num_blocks * self._kv.block_size if swapped is None else swapped.num_tokens
            if not self._config.chunked_prefill and total - cached > budget:
                return
            if self._kv.cost(prefix, total, chunk) + self._reserved_blocks() > self._kv.pool.num_free:
                return
            self._waiting.pop()
            row = self._batch.assign_row(seq)
            if swapped is not None:
                builder.swap_in += self._kv.swap_in(row, swapped, prefix)
            else:
                self._kv.admit(row, prefix)
                cached += self._residency.load(seq, row, prefix.num_blocks, builder)
            self._state.drop_swapped(seq)
            seq.status, seq.fetched = Status.RUNNING, None
            end = min(total, cached + budget)
            self._kv.extend(np.array([row], np.int32), np.array([end], np.int32))
            self._batch.computed[row] = end
            self._prefilling.append(row)
            builder.admitted.append(seq.admission(row))
            self._add_chunk(builder, row, cached, end)
            if not seq.preempted:
                self._count_admission(seq, cached)

    def _add_chunk(self, builder: StepBuilder, row: int, start: int, end: int) -> None:
        """Plan a prefill chunk; its full blocks can be shared from now on, in this very step too."""
        last = end == int(self._batch.prefill[row])
        builder.add_chunk(row, start, end, last=last)
        if last:
            self._prefilling.remove(row)
        self._residency.register(row, end)

    def _count_admission(self, seq: Sequence, cached: int) -> None:
        seq.num_cached = cached
        seq.queued = max(0.0, time.monotonic() - seq.arrival)
        if self._kv.enable_prefix_cache and seq.may_use_cache:
            self._stats.prefix_queries += seq.num_prompt
            self._stats.prefix_hits += cached

    def _reserved_blocks(self) -> int:
        """Free blocks that admissions leave to running rows: what partial prefills still take, and room to decode.

        A quarter block a row keeps a full pool from admitting a request only to preempt it a few steps later.
        """
        batch, chunk = self._batch, self._config.max_num_batched_tokens
        prefills = sum(self._kv.outstanding(row, int(batch.prefill[row]), chunk) for row in self._prefilling)
        return prefills + (batch.num_running + 3) // 4

    def _preempt_for_rank(self) -> None:
        """Let a waiting request of better rank take the place of running ones of worse rank.

        This happens before anything of the step is planned, so no block of the step is lost by it.
        """
        if not self._config.policy.preempts or not self._batch.num_running:
            return
        seq = self._waiting.peek()
        if seq is None or seq.in_flight:
            return
        by_key = sorted(self._batch.running(), key=lambda other: other.key)
        while by_key and by_key[-1].key[0] > seq.key[0] and not self._fits(seq):
            self.preempt(by_key.pop())

    def _fits(self, seq: Sequence) -> bool:
        cost = self._kv.cost(self._residency.kept(seq)[0], len(seq.token_ids), self._config.max_num_batched_tokens)
        return self._batch.num_free > 0 and cost + self._reserved_blocks() <= self._kv.pool.num_free

    def preempt(self, seq: Sequence) -> None:
        """Take a row from its request, which goes back to waiting.

        Its KV goes to the host if that has room; otherwise it later recomputes what is not cached. Tokens of it that
        are in flight still count; it is not admitted again before they have arrived.
        """
        generation = self._batch.generation[seq.row]
        for step in self._state.in_flight:
            for i in np.flatnonzero((step.plan.rows == seq.row) & (step.generations == generation)).tolist():
                step.preempted[i] = seq
                seq.in_flight += int(step.plan.samples[i])
        self._residency.swap_out(seq)
        self._state.free_row(seq)
        seq.preempted = True
        self._waiting.push(seq)
        self._stats.preemptions += 1
