"""The step scheduler: continuous batching with chunked prefill, prefix sharing, and preemption by swap or recompute.

`schedule` plans a step and may be called again before the results of the step before are known; `update`
takes a step's results in the order of the plans. It decides what runs and owns the requests; it touches no
device and knows no text. Steps execute on the device in the order planned, so KV of a planned step counts
as written for every later plan, and for what is admitted in the same one (see `StepPlan`).

A prefix is computed once, also by requests that arrive together. Prefills are planned one after the other in the order
of admission, and nobody is admitted while one is unfinished; the full blocks of a chunk can be shared from its plan on.
So whoever is admitted finds every full block that those before it compute of the prefix they share: none of these is
still to be planned. Followers wait in the queue, not on a request: when the first of them is preempted or aborted, the
next in the queue is admitted on the blocks planned so far and computes the others itself. Nothing here can deadlock,
and nobody waits longer than without the cache. What a request still computes alone is the block in which it parts from
the others, its last token, and what was evicted before its turn.

Hot path: a steady decode step costs a fixed number of NumPy calls; only rows that start, end, fill or need
a block are looped over. `ci/bench/scheduler.py` measures it: schedule and update of 256 decoding rows within
0.25 ms on one core.
"""

from __future__ import annotations

import math
import time
import typing
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from hotplug.core.errors import ConfigError, PromptTooLongError, QueueFullError, RequestError
from hotplug.core.kv.host import Swapped
from hotplug.core.kv.manager import KVManager, Prefix
from hotplug.core.kv.prefix import BlockHashes
from hotplug.core.logprobs import TokenLogprobs
from hotplug.core.request import NO_TOKEN, EngineStats, Request, TokenDelta
from hotplug.core.scheduler.builder import StepBuilder
from hotplug.core.scheduler.drafter import Speculation
from hotplug.core.scheduler.plan import IntArray, StepPlan, StepResult
from hotplug.core.scheduler.policy import FCFS, SchedulingPolicy, rank_of
from hotplug.core.scheduler.running import RunningBatch
from hotplug.core.scheduler.sequence import Sequence
from hotplug.core.scheduler.speculator import Speculator
from hotplug.core.scheduler.tokens import StepTokens, token_array
from hotplug.core.scheduler.waiting import WaitingQueue

NO_SCORES = (
    "the model's scores for the next token are not finite numbers: its numbers overflowed on this request's tokens, or "
    "something that changes scores made them so"
)
"""Why a request ends whose token is `NO_TOKEN`."""
MOST_SCORED = 64
"""Tokens with scores that a step may have however few requests may run: bounds the memory that proposals take."""


class ShortPrompts(NamedTuple):
    """The most of prompts that a step may hold for the device to start it at once, as it does a step of decodes."""

    tokens: int
    chunks: int


PATIENCE = 4
"""Steps of short prompts that new prompts may need before throughput counts for more than the tokens of others."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What bounds a step. Raises ConfigError for combinations that could not make progress."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    policy: SchedulingPolicy = FCFS
    chunked_prefill: bool = True
    mixed_steps: bool = True
    """Whether a step may hold prefills and decodes; False for devices that cannot mix them."""
    max_prefill_requests: int | None = None
    """Requests that a step with prefills may hold, decodes counted; None = no such bound."""
    short_prompts: ShortPrompts | None = None
    """A step with decodes holds no more of prompts, unless more waits than a few such steps take; None: no such bound.
    So a long prompt comes in parts that are over soon, and those who decode get their next token then."""
    max_queue: int = 4096
    """Requests that may wait beyond those that a free row awaits."""
    seed: int = 0
    speculation: Speculation | None = None
    """How requests speculate; None where they cannot."""

    def __post_init__(self) -> None:
        budget = self.max_num_batched_tokens
        if self.mixed_steps and budget < self.max_num_seqs:
            raise ConfigError(f"max_num_batched_tokens ({budget}) is below max_num_seqs ({self.max_num_seqs})",
                              why="every running request needs one token of the budget a step",
                              hint="Raise max_num_batched_tokens or lower max_num_seqs.")  # fmt: skip
        if self.mixed_steps and self.max_num_seqs > (self.max_prefill_requests or self.max_num_seqs):
            raise ConfigError(f"max_prefill_requests ({self.max_prefill_requests}) is below max_num_seqs "
                              f"({self.max_num_seqs})",
                              why="a step full of decodes would keep every prefill out")  # fmt: skip
        if not self.chunked_prefill and budget < self.max_model_len:
            raise ConfigError(
                f"max_num_batched_tokens ({budget}) is below max_model_len ({self.max_model_len}) while "
                "chunked prefill is off",
                hint="Raise max_num_batched_tokens, lower max_model_len or turn chunked prefill on.",
            )


@dataclass(slots=True)
class _InFlight:
    """A plan whose results are outstanding."""

    plan: StepPlan
    generations: npt.NDArray[np.int64]
    """[R] generation of each row when planned."""
    preempted: dict[int, Sequence] = field(default_factory=dict)
    """By index in the plan: requests that lost their row since."""


class Store(Protocol):
    """What the scheduler needs of a KV connector (`hotplug.core.transfer.connector`)."""

    def contains(self, digest: bytes) -> bool: ...

    def fetch(self, digests: list[bytes]) -> typing.Sequence[Any]: ...


class Scheduler:
    """Plans steps over the requests it was given; see the module's docstring for the protocol."""

    def __init__(self, config: SchedulerConfig, kv: KVManager, connector: Store | None = None) -> None:
        self._connector = connector
        self._saves: list[tuple[int, bytes]] = []
        self.config = config
        self.kv = kv
        # The last token of a sequence needs no KV. A sequence that has the pool to itself always fits: this is
        # what rules out a deadlock.
        self.max_model_len = min(config.max_model_len, kv.max_tokens_alone(config.max_num_batched_tokens) + 1)
        """Longest sequence that can be served: the configured one, or less where the KV pool is smaller."""
        self._most_scored = config.max_prefill_requests or max(config.max_num_seqs, MOST_SCORED)
        self._batch = RunningBatch(config.max_num_seqs, self.max_model_len)
        self._waiting = WaitingQueue()
        self._no_bound = ShortPrompts(config.max_num_batched_tokens, self._most_scored)
        self._requests: dict[str, Sequence] = {}
        self._prefilling: list[int] = []
        self._released: list[int] = []
        self._in_flight: deque[_InFlight] = deque()
        self._last_was_prefill = False
        self._arrivals = 0
        self._random = np.random.default_rng(config.seed)
        self._speculator = Speculator(
            config.speculation,
            self._batch,
            kv,
            max_tokens=config.max_num_batched_tokens,
            most_scored=self._most_scored,
        )
        self._stats = EngineStats(kv_blocks_total=kv.pool.num_usable)
        if kv.host is not None:
            self._stats.host_blocks_total = kv.host.blocks.num_usable

    # --- requests come and go ---

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended. Results may be outstanding even when none is left."""
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError, PromptTooLongError or QueueFullError."""
        prompt = self._checked_prompt(request)
        if len(self._waiting) >= self.config.max_queue + self._batch.num_free:
            batches = len(self._waiting) // self.config.max_num_seqs
            raise QueueFullError(f"{len(self._waiting)} requests are waiting", retry_after=1 + batches)
        if not request.arrival:
            request = msgspec.structs.replace(request, arrival=time.monotonic())
        rank = rank_of(self.config.policy, request)
        drafter = self._speculator.drafter(request)
        seed = request.sampling.seed
        self._arrivals += 1
        seq = Sequence(
            request,
            prompt,
            key=(rank, self._arrivals),
            seed=int(self._random.integers(2**63)) if seed is None else seed,
            arrival=request.arrival,
            max_model_len=self.max_model_len,
            hashes=BlockHashes(self.kv.block_size, request.cache_salt),
            drafter=drafter,
        )
        self._waiting.push(seq)  # nothing after it can fail: a request is known as a whole or not at all
        self._requests[request.id] = seq
        self._speculator.num_requests += drafter is not None

    def abort(self, request_id: str) -> bool:
        """End a request wherever it is; its blocks are free at once. False when it is not known (any more)."""
        seq = self._requests.get(request_id)
        if seq is None:
            return False
        self._end(seq)
        return True

    @property
    def requests(self) -> list[Request]:
        """Those that have not ended."""
        return [seq.request for seq in self._requests.values()]

    def stats(self) -> EngineStats:
        """A snapshot; `reference_ops` is the engine's to fill."""
        self._stats.running = self._batch.num_running
        self._stats.waiting = len(self._waiting)
        self._stats.kv_blocks_used = self.kv.pool.num_used
        if self.kv.host is not None:
            self._stats.host_blocks_used = self.kv.host.blocks.num_used
        return msgspec.structs.replace(self._stats)

    def _checked_prompt(self, request: Request) -> IntArray:
        if request.id in self._requests:
            raise RequestError(f"a request with id {request.id!r} is running already", param="id")
        n = len(request.prompt_token_ids)
        if n == 0:
            raise RequestError("the prompt is empty", param="prompt", hint="Send at least one token.")
        if n + 1 > self.max_model_len:
            capped = self.max_model_len < self.config.max_model_len
            reason = "the KV cache holds" if capped else "the context holds"
            raise PromptTooLongError(
                f"the prompt has {n} tokens; {reason} {self.max_model_len}, prompt and output together",
                param="prompt",
                hint="Shorten the prompt" + (" or raise kv_cache_memory." if capped else "."),
            )
        room = self.max_model_len - n
        if request.sampling.min_tokens > room:
            raise RequestError(
                f"min_tokens is {request.sampling.min_tokens}, but the prompt has {n} tokens and the context, output "
                f"included, is {self.max_model_len}",
                param="min_tokens",
                hint=f"Ask for at most {room}.",
            )
        return np.array(token_array(request.prompt_token_ids))  # a copy: the buffer it came in may be a message

    # --- planning ---

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run before a request is added or a step in flight is updated."""
        if self.kv.groups.free_blocks_early:
            rows = self._batch.rows()
            self.kv.trim(rows, self._batch.computed[rows])
        self._preempt_for_rank()
        if self.config.mixed_steps:
            return self._plan(decode=True, prefill=True)
        # Prefills and decodes take turns, so neither a stream of new requests nor a long answer starves the other.
        decode = self._last_was_prefill
        return self._plan(decode=decode, prefill=not decode) or self._plan(decode=not decode, prefill=decode)

    def _plan(self, *, decode: bool, prefill: bool) -> StepPlan | None:
        saves = self.take_saves()  # what this step fills is saved before the next one
        bound = self._prompt_bound(decode)
        rows, ends, n, drafts = self._running_work(decode, prefill, bound)
        start = self._batch.computed[rows]
        self.kv.extend(rows, ends)
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
            self._saves = saves
            return None
        plan = builder.build(self._released, self.kv.take_changes(), saves, self.kv.take_swap_out())
        self._released = []
        self._stats.blocks_swapped_out += len(plan.swap_out)
        self._stats.blocks_swapped_in += len(plan.swap_in)
        self._in_flight.append(_InFlight(plan, self._batch.generation[plan.rows]))
        self._last_was_prefill = builder.has_prefill
        self._stats.steps += 1
        return plan

    def _prompt_bound(self, decode: bool) -> ShortPrompts:
        """What a step may hold of prompts, within the budget of all."""
        short, batch = self.config.short_prompts, self._batch
        if short is None or not decode or not self.config.chunked_prefill or batch.num_running == len(self._prefilling):
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
                budget = min(self.config.max_num_batched_tokens - num_decodes - more, bound.tokens)
                chunks = []
                for row in self._prefilling[: max(min(self._most_scored - num_decodes - more, bound.chunks), 0)]:
                    n = min(budget, int(batch.prefill[row] - batch.computed[row]))
                    if n > 0:
                        budget -= n
                        chunks.append((row, int(batch.computed[row]) + n))
                chunk_rows, chunk_ends = np.array(chunks, np.int32).reshape(-1, 2).T
                rows, ends = np.concatenate((rows, chunk_rows)), np.concatenate((ends, chunk_ends))
            if not self.kv.missing(rows, ends):
                break
            self._preempt(max(batch.running(), key=lambda seq: seq.key))
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
        chunk = self.config.max_num_batched_tokens
        while (
            (budget := min(chunk - builder.num_tokens, bound.tokens - builder.chunk_tokens)) > 0
            and builder.num_chunks < bound.chunks
            and not self._prefilling  # it may be about to compute what they share
            and self._batch.num_free
            and builder.num_scored < self._most_scored
        ):
            seq = self._waiting.peek()
            if seq is None or seq.in_flight:
                return
            total = len(seq.token_ids)
            prefix, swapped = self._kept(seq)
            cached = prefix.num_blocks * self.kv.block_size if swapped is None else swapped.num_tokens
            if not self.config.chunked_prefill and total - cached > budget:
                return
            if self.kv.cost(prefix, total, chunk) + self._reserved_blocks() > self.kv.pool.num_free:
                return
            self._waiting.pop()
            row = self._batch.assign_row(seq)
            if swapped is not None:
                builder.swap_in += self.kv.swap_in(row, swapped, prefix)
            else:
                self.kv.admit(row, prefix)
                if self._connector is not None:
                    cached += self._fetch(seq, row, cached, builder)
            self._drop_swapped(seq)
            end = min(total, cached + budget)
            self.kv.extend(np.array([row], np.int32), np.array([end], np.int32))
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
        self._register(row, end)

    # --- the prefix cache ---

    def _kept(self, seq: Sequence) -> tuple[Prefix, Swapped | None]:
        """What a waiting request need not compute again: its cached prefix, or its KV on the host where that reaches
        further. With the latter goes what of it is cached still."""
        prefix, swapped = self._cached_prefix(seq), seq.swapped
        if swapped is None or prefix.num_blocks * self.kv.block_size >= swapped.num_tokens:
            return prefix, None
        return self.kv.shared(prefix, swapped), swapped

    def _cached_prefix(self, seq: Sequence) -> Prefix:
        """The cached prefix of a waiting request: whole blocks, one token at least left."""
        if not self.kv.enable_prefix_cache or not seq.may_use_cache:
            return self.kv.match(())
        full = (len(seq.token_ids) - 1) // self.kv.block_size
        return self.kv.match(seq.hashes.extend(seq.token_ids, full)[:full])

    def _register(self, row: int, num_tokens: int) -> None:
        """Offer the full blocks among a row's first `num_tokens` tokens, whose values are known, to the cache."""
        if self.kv.enable_prefix_cache:
            full = num_tokens // self.kv.block_size
            hashes = self._batch.owner(row).hashes
            new = self.kv.register(row, hashes.extend(self._batch.history[row], full), full)
            if self._connector is not None:
                self._saves += [(block, digest) for block, digest in new if not self._connector.contains(digest)]

    def _fetch(self, seq: Sequence, row: int, cached: int, builder: StepBuilder) -> int:
        """Take what the connector has after the first `cached` tokens of a row; returns how many tokens that is."""
        assert self._connector is not None
        size = self.kv.block_size
        first, full = cached // size, (len(seq.token_ids) - 1) // size
        if not seq.may_use_cache or first >= full:
            return 0
        digests = seq.hashes.extend(seq.token_ids, full)[:full]
        blocks = self._connector.fetch(digests[first:])
        if not blocks:
            return 0
        end = first + len(blocks)
        self.kv.extend(np.array([row], np.int32), np.array([end * size], np.int32))
        builder.loads += zip(self.kv.tables[0].held(row, first, end)[0], blocks, strict=True)
        self.kv.register(row, digests, end)
        return len(blocks) * size

    def take_saves(self) -> list[tuple[int, bytes]]:
        """Blocks to hand to the connector, with their hashes, before any later step is run."""
        saves, self._saves = self._saves, []
        return saves

    def _count_admission(self, seq: Sequence, cached: int) -> None:
        seq.num_cached = cached
        seq.queued = max(0.0, time.monotonic() - seq.arrival)
        if self.kv.enable_prefix_cache and seq.may_use_cache:
            self._stats.prefix_queries += seq.num_prompt
            self._stats.prefix_hits += cached

    # --- preemption ---

    def _reserved_blocks(self) -> int:
        """Free blocks that admissions leave to running rows: what partial prefills still take, and room to decode.

        A quarter block a row keeps a full pool from admitting a request only to preempt it a few steps later.
        """
        batch, chunk = self._batch, self.config.max_num_batched_tokens
        prefills = sum(self.kv.outstanding(row, int(batch.prefill[row]), chunk) for row in self._prefilling)
        return prefills + (batch.num_running + 3) // 4

    def _preempt_for_rank(self) -> None:
        """Let a waiting request of better rank take the place of running ones of worse rank.

        This happens before anything of the step is planned, so no block of the step is lost by it.
        """
        if not self.config.policy.preempts or not self._batch.num_running:
            return
        seq = self._waiting.peek()
        if seq is None or seq.in_flight:
            return
        by_key = sorted(self._batch.running(), key=lambda other: other.key)
        while by_key and by_key[-1].key[0] > seq.key[0] and not self._fits(seq):
            self._preempt(by_key.pop())

    def _fits(self, seq: Sequence) -> bool:
        cost = self.kv.cost(self._kept(seq)[0], len(seq.token_ids), self.config.max_num_batched_tokens)
        return self._batch.num_free > 0 and cost + self._reserved_blocks() <= self.kv.pool.num_free

    def _preempt(self, seq: Sequence) -> None:
        """Take a row from its request, which goes back to waiting.

        Its KV goes to the host if that has room; otherwise it later recomputes what is not cached. Tokens of it that
        are in flight still count; it is not admitted again before they have arrived.
        """
        generation = self._batch.generation[seq.row]
        for step in self._in_flight:
            for i in np.flatnonzero((step.plan.rows == seq.row) & (step.generations == generation)).tolist():
                step.preempted[i] = seq
                seq.in_flight += int(step.plan.samples[i])
        self._swap_out(seq)
        self._free_row(seq)
        seq.preempted = True
        self._waiting.push(seq)
        self._stats.preemptions += 1

    def _swap_out(self, seq: Sequence) -> None:
        """Keep a running request's KV on the host, if there is room.

        That is the KV of every token planned so far: steps in flight write theirs before the next plan's copies. So
        of the tokens that the request comes back with, only the last needs computing, or what was left of its prompt.
        """
        if self.kv.host is None:
            return
        row, digests = seq.row, []
        computed = int(self._batch.computed[row])
        if self.kv.enable_prefix_cache:
            full = min(computed, int(self._batch.known[row])) // self.kv.block_size
            digests = seq.hashes.extend(self._batch.history[row], full)[:full]
        seq.swapped = self.kv.swap_out(row, computed, digests)

    def _drop_swapped(self, seq: Sequence) -> None:
        if seq.swapped is not None:
            self.kv.drop(seq.swapped)
            seq.swapped = None

    def _free_row(self, seq: Sequence) -> None:
        row = seq.row
        if row in self._prefilling:
            self._prefilling.remove(row)
        self.kv.free(row)
        self._batch.remove(seq)
        self._released.append(row)

    def _end(self, seq: Sequence) -> None:
        if seq.row >= 0:
            self._free_row(seq)
        else:
            self._waiting.remove(seq)
            self._drop_swapped(seq)
        seq.done = True
        self._speculator.num_requests -= seq.drafter is not None
        del self._requests[seq.request.id]

    # --- results ---

    def update(self, plan: StepPlan, result: StepResult) -> StepTokens:
        """Take the results of the oldest plan in flight; ends requests and returns what each request gained.

        Tokens of requests that ended while the step was in flight are dropped. Raises ValueError when `plan` is
        not the oldest in flight.
        """
        if not self._in_flight or self._in_flight[0].plan is not plan:
            raise ValueError("update takes the plans in the order schedule made them")
        step, batch = self._in_flight.popleft(), self._batch
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
        for i in self.kv.unregistered(rows, written).tolist():
            self._register(int(rows[i]), int(written[i]))
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
        self._register(row, int(batch.computed[row]))
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
        self._end(seq)

    def _fail(self, seq: Sequence, tokens: list[int]) -> TokenDelta:
        """End a request that has no scores to choose from, after those of `tokens` that are some.

        Nobody finds its blocks any more. What is in them follows from their tokens, so whoever sends the same fails as
        it did; but if a fault of the device made them, they are not kept.
        """
        digests = seq.hashes.digests
        self.kv.forget(digests)
        self._saves = [save for save in self._saves if save[1] not in digests]
        delta = TokenDelta(seq.request.id, [token for token in tokens if token != NO_TOKEN], "error",
                           error=NO_SCORES, tag=seq.request.tag)  # fmt: skip
        if not seq.started:
            seq.prompt_logprobs = None
            self._start(seq, delta)
        self._end(seq)
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
