"""What a step gave: tokens to their requests, ends, failures, and blocks that others may share."""

from __future__ import annotations

import math

import numpy as np

from hotplug.core.logprobs import TokenLogprobs
from hotplug.core.request import NO_TOKEN, TokenDelta
from hotplug.core.scheduler.plan import StepPlan, StepResult
from hotplug.core.scheduler.residency import Residency
from hotplug.core.scheduler.sequence import Sequence
from hotplug.core.scheduler.state import SchedulerState
from hotplug.core.scheduler.tokens import StepTokens

NO_SCORES = (
    "the model's scores for the next token are not finite numbers: its numbers overflowed on this request's tokens, or "
    "something that changes scores made them so"
)
"""Why a request ends whose token is `NO_TOKEN`."""


class Results:
    """Takes the results of steps in the order of their plans."""

    def __init__(self, state: SchedulerState, residency: Residency) -> None:
        self._state = state
        self._kv = state.kv
        self._batch = state.batch
        self._stats = state.stats
        self._residency = residency

    def update(self, plan: StepPlan, result: StepResult) -> StepTokens:
        """Take the results of the oldest plan in flight; ends requests and returns what each request gained.

        Tokens of requests that ended while the step was in flight are dropped. Raises ValueError when `plan` is
        not the oldest in flight.
        """
        if not self._state.in_flight or self._state.in_flight[0].plan is not plan:
            raise ValueError("update takes the plans in the order schedule made them")
        step, batch = self._state.in_flight.popleft(), self._batch
        own = step.generations == batch.generation[plan.rows]
        if result.prompt_logprobs:
            for i in np.flatnonzero(own).tolist():
                self._keep_prompt_logprobs(batch.owner(plan.rows[i]), plan, i, result)
        rows, tokens = plan.rows, result.token_ids
        live = own & plan.samples
        live[plan.num_decodes : plan.first_chunk] = False
        if not live.all():
            rows, tokens = rows[live], tokens[live]
        stopped, full = batch.append(rows, tokens)
        written = np.minimum(batch.known[rows], batch.computed[rows])
        for i in self._kv.unregistered(rows, written).tolist():
            self._residency.register(int(rows[i]), int(written[i]))
        # From here on only exceptional rows are looked at.
        special = batch.first[rows] | stopped | full
        if result.logprobs:
            special |= np.isin(rows, list(result.logprobs))
        tags, ids = batch.tags[rows], batch.ids[rows]
        deltas: list[TokenDelta] = []
        if special.any():
            ended = stopped | full
            for i in np.flatnonzero(special).tolist():
                deltas.append(self._sampled(int(rows[i]), int(tokens[i]), result, bool(ended[i]), bool(stopped[i])))
            steady = ~special
            tags, ids, tokens = tags[steady], ids[steady], tokens[steady]
        deltas += [self._verified(plan, i, result) for i in plan.verifies if own[i]]
        for i, seq in step.preempted.items():
            if not seq.done:
                deltas += self._late(seq, plan, i, result)
        gained = StepTokens(tags, tokens, ids, deltas)
        self._stats.generated_tokens += gained.num_tokens
        return gained

    def _sampled(self, row: int, token: int, result: StepResult, ended: bool, stopped: bool) -> TokenDelta:
        """One token of a row, with what goes with it: a beginning, an end, log-probabilities."""
        seq = self._batch.owner(row)
        if token == NO_TOKEN or not _scored(seq, result.logprobs.get(row)):
            return self._fail(seq, [])
        delta = TokenDelta(seq.request.id, [token], logprobs=result.logprobs.get(row), tag=seq.request.tag)
        if not seq.started:
            self._start(seq, delta)
        if ended:
            self._finish(seq, delta, stopped=stopped)
        return delta

    def _verified(self, plan: StepPlan, i: int, result: StepResult) -> TokenDelta:
        """What a verification, entry `i` of a step, gives to the request that still has its row."""
        batch, row = self._batch, int(plan.rows[i])
        seq = batch.owner(row)
        delta, stopped = self._accepted(seq, plan, i, result)
        if NO_TOKEN in delta.token_ids or not _scored(seq, delta.logprobs):
            return self._fail(seq, delta.token_ids)
        batch.confirm(row, delta.token_ids)
        self._residency.register(row, int(batch.computed[row]))
        if stopped or batch.known[row] >= batch.limit[row]:
            self._finish(seq, delta, stopped=stopped)
        return delta

    def _accepted(self, seq: Sequence, plan: StepPlan, i: int, result: StepResult) -> tuple[TokenDelta, bool]:
        """The tokens that a verification gives a request, up to a stop token; whether there is one."""
        row, proposed = int(plan.rows[i]), int(plan.num_tokens[i]) - 1
        accepted = len(result.verified[row]) - 1
        if seq.drafter is not None:
            seq.drafter.learn(proposed, accepted)
        self._stats.verifications += 1
        self._stats.proposed_tokens += proposed
        self._stats.accepted_tokens += accepted
        tokens, stopped = seq.until_stop(result.verified[row])
        delta = TokenDelta(seq.request.id, tokens, tag=seq.request.tag)
        if (entries := result.logprobs.get(row)) is not None:
            delta.logprobs = entries[: len(tokens)]
        return delta, stopped

    def _late(self, seq: Sequence, plan: StepPlan, i: int, result: StepResult) -> list[TokenDelta]:
        """What entry `i` of a step brings to a request that was preempted while the step was in flight."""
        self._keep_prompt_logprobs(seq, plan, i, result)
        if not plan.samples[i]:
            return []
        seq.in_flight -= 1
        if i in plan.verifies:
            delta, stopped = self._accepted(seq, plan, i, result)
        else:
            token = int(result.token_ids[i])
            delta, stopped = TokenDelta(seq.request.id, [token], tag=seq.request.tag), token in seq.stop_tokens
            delta.logprobs = result.logprobs.get(int(plan.rows[i]))
        if NO_TOKEN in delta.token_ids or not _scored(seq, delta.logprobs):
            return [self._fail(seq, delta.token_ids)]
        seq.append(delta.token_ids)
        if not seq.started:
            self._start(seq, delta)
        if stopped or len(seq.token_ids) >= seq.limit:
            self._finish(seq, delta, stopped=stopped)
        return [delta]

    def _start(self, seq: Sequence, delta: TokenDelta) -> None:
        """Fill in what only the first delta of a request carries."""
        seq.started = True
        if seq.row >= 0:
            self._batch.first[seq.row] = False
        delta.num_cached_tokens, delta.queued = seq.num_cached, seq.queued
        if seq.prompt_logprobs is not None:
            delta.prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs.sent(), None
        self._stats.prompt_tokens += seq.num_prompt

    def _finish(self, seq: Sequence, delta: TokenDelta, *, stopped: bool) -> None:
        delta.finish_reason = "stop" if stopped else "length"
        delta.stop_token = delta.token_ids[-1] if stopped else None
        self._state.end(seq)

    def _fail(self, seq: Sequence, tokens: list[int]) -> TokenDelta:
        """End a request that has no scores to choose from, after those of `tokens` that are some.

        Nobody finds its blocks any more. What is in them follows from their tokens, so whoever sends the same fails as
        it did; but if a fault of the device made them, they are not kept.
        """
        digests = seq.hashes.digests
        self._residency.forget(digests)
        delta = TokenDelta(seq.request.id, [token for token in tokens if token != NO_TOKEN], "error",
                           error=NO_SCORES, tag=seq.request.tag)  # fmt: skip
        if not seq.started:
            seq.prompt_logprobs = None
            self._start(seq, delta)
        self._state.end(seq)
        return delta

    def _keep_prompt_logprobs(self, seq: Sequence, plan: StepPlan, i: int, result: StepResult) -> None:
        chunk = result.prompt_logprobs.get(int(plan.rows[i]))
        if chunk is not None and seq.prompt_logprobs is not None:
            seq.prompt_logprobs.put(int(plan.start[i]), chunk)


def _scored(seq: Sequence, entries: list[TokenLogprobs] | None) -> bool:
    """Whether log-probabilities, if there are any, are of scores that are numbers: of tokens, and those of the prompt
    that are still to be sent."""
    if seq.prompt_logprobs is not None and not seq.prompt_logprobs.are_numbers:
        return False
    return not entries or not any(math.isnan(entry.logprobs[0]) for entry in entries)
