"""A device that only remembers which token of which history lies in which KV slot, and an engine loop around it.

What a slot holds is a digest of everything up to its position, so a block that is stale, shared wrongly, or
written one position off is noticed by the first query that reads it. Sampled tokens depend on the history
alone: the output of a request must be the same whatever else ran.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
from kv_groups import one_group

from hotplug.core.kv.groups import KVGroups
from hotplug.core.kv.manager import KVManager
from hotplug.core.request import Request, SamplingParams, TokenDelta
from hotplug.core.scheduler.config import MOST_SCORED, SchedulerConfig
from hotplug.core.scheduler.plan import StepPlan, StepResult
from hotplug.core.scheduler.scheduler import Scheduler

VOCAB = 40
EOS = 7


def fold(digest: int, token: int) -> int:
    return hash((digest, token))


def next_token(digest: int, last: int, repeats: int = 0) -> int:
    """The token after a history that ends with `last`; with `repeats` n, mostly what followed it before.

    One token in n is not.
    """
    if repeats and digest % repeats:
        return (last * 5 + 3) % 8 + 8
    return digest % VOCAB


def generate_alone(request: Request, max_len: int, repeats: int = 0) -> tuple[list[int], str]:
    """Output tokens and finish reason of a request without any engine."""
    digest = hash_of_salt(request.cache_salt)
    for token in request.prompt_token_ids:
        digest = fold(digest, token)
    most = request.sampling.max_tokens or max_len
    stops = set(request.sampling.stop_token_ids)
    if not request.sampling.ignore_eos:
        stops |= set(request.eos_token_ids)
    output: list[int] = []
    last = request.prompt_token_ids[-1]
    while True:
        output.append(last := next_token(digest, last, repeats))
        if output[-1] in stops:
            return output, "stop"
        if len(output) >= most or len(request.prompt_token_ids) + len(output) >= max_len:
            return output, "length"
        digest = fold(digest, output[-1])


def hash_of_salt(salt: str) -> int:
    return sum((i + 1) * ord(c) for i, c in enumerate(salt)) + 1


class FakeConnector:
    """Keeps blocks by hash; now and then it has fewer than it could."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, list[int]] = {}
        self.fetched = 0

    def contains(self, digest: bytes) -> bool:
        return digest in self.blocks

    def fetch(self, digests: list[bytes]) -> list[list[int]]:
        found = list(itertools.takewhile(self.contains, digests))
        found = found[: len(found) - self.fetched % 2]
        self.fetched += len(found)
        return [self.blocks[digest] for digest in found]


Content = tuple[int, int]
"""What a cell of the cache holds: its table, and the hash of all tokens up to its own."""


class Delayed:
    """Runs calls `steps` ticks after they were submitted, in order: blocks that take their time to come."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._calls: list[tuple[int, Future[Any], Callable[[], Any]]] = []
        self._now = 0

    def submit(self, call: Callable[..., Any], /, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.append((self._now + self.steps, future, partial(call, *args)))
        return future

    def tick(self) -> None:
        self._now += 1
        while self._calls and self._calls[0][0] <= self._now:
            _, future, call = self._calls.pop(0)
            future.set_result(call())


class FakeDevice:
    """Executes plans at once, in order, as a device stream would. `salts` maps a request's seed to its salt."""

    def __init__(
        self, kv: KVManager, salts: dict[int, str], connector: FakeConnector | None = None, repeats: int = 0
    ) -> None:
        self.connector = connector
        self.repeats = repeats
        self.block_size = kv.block_size
        self.windows = [group.spec.reach for group in kv.groups.groups for _ in group.tables]  # type: ignore[attr-defined]
        self.tables = np.full((kv.groups.num_tables, *kv.tables[0].pages.shape[1:]), -1, np.int32)
        self.slots: dict[int, Content | None] = {}
        self.host: dict[int, list[Content | None]] = {}
        self.salts = salts
        self.rows: dict[int, list[int]] = {}
        self.chains: dict[int, list[int]] = {}
        self.admitted_len: dict[int, int] = {}
        self.computed_tokens = 0

    def save(self, blocks: list[tuple[int, bytes]]) -> None:
        for block, digest in blocks:
            assert self.connector is not None
            first = block * self.block_size
            self.connector.blocks.setdefault(digest, [self.slots[first + i] for i in range(self.block_size)])

    def execute(self, plan: StepPlan) -> StepResult:
        self.save(plan.saves)
        self._swap(plan)
        for block, contents in plan.loads:
            self.slots.update({block * self.block_size + i: content for i, content in enumerate(contents)})
        self._apply(plan)
        entries = list(zip(plan.rows.tolist(), plan.start.tolist(), plan.num_tokens.tolist(), strict=True))
        drafts = self._drafts(plan)
        for row, start, n in entries:
            chain = self.chains[row] if row not in drafts else self._chain_of_draft(row, drafts[row])
            for position in range(start, start + n):
                for table in range(len(self.tables)):
                    self.slots[self._slot(table, row, position)] = table, chain[position]
        tokens, verified = [], {}
        for i, (row, start, n) in enumerate(entries):
            self.computed_tokens += n
            history = self.rows[row]
            if i in plan.verifies:
                assert plan.samples[i] and start == len(history) - 1 >= self.admitted_len[row]
                verified[row] = self._verify(row, drafts[row])
                self._read(row, start, start + len(verified[row]))
                tokens.append(verified[row][-1])
                continue
            self._read(row, start, start + n)
            if i < plan.num_decodes:
                assert n == 1 and plan.samples[i] and start == len(history) - 1 >= self.admitted_len[row]
            assert bool(plan.samples[i]) == (start + n == len(history))
            tokens.append(self._next(row) if plan.samples[i] else -7)
            if plan.samples[i]:
                self._append(row, tokens[-1])
        return StepResult(token_ids=np.array(tokens, np.int32), verified=verified)

    def _next(self, row: int) -> int:
        return next_token(self.chains[row][-1], self.rows[row][-1], self.repeats)

    def _drafts(self, plan: StepPlan) -> dict[int, list[int]]:
        """By row: the input tokens of the verifications."""
        ends = np.cumsum(plan.num_tokens[plan.num_decodes : plan.first_chunk])
        assert (ends[-1] if len(ends) else 0) == len(plan.drafts)
        parts = np.split(plan.drafts, ends[:-1]) if len(ends) else []
        return {int(plan.rows[i]): part.tolist() for i, part in zip(plan.verifies, parts, strict=True)}

    def _chain_of_draft(self, row: int, draft: list[int]) -> list[int]:
        """The row's chain as if all that was proposed were right: what the step writes."""
        assert draft[0] == self.rows[row][-1], "a verification begins with the row's last token"
        chain = list(self.chains[row])
        for token in draft[1:]:
            chain.append(fold(chain[-1], token))
        return chain

    def _verify(self, row: int, draft: list[int]) -> list[int]:
        """Confirm proposals as far as they are right, and give the token after them."""
        found = []
        for proposed in [*draft[1:], None]:
            found.append(self._next(row))
            self._append(row, found[-1])
            if found[-1] != proposed:
                return found
        raise AssertionError

    def _swap(self, plan: StepPlan) -> None:
        for targets in ([host for _, host in plan.swap_out], [block for block, _ in plan.swap_in]):
            assert len(set(targets)) == len(targets) and 0 not in targets, "a block is copied to twice, or block 0 is"
        size = self.block_size
        # Copies out may run in any order among themselves, copies in too.
        self.host |= {
            host: [self.slots.get(block * size + i) for i in range(size)] for block, host in reversed(plan.swap_out)
        }
        for block, host in reversed(plan.swap_in):
            for i, content in enumerate(self.host[host]):
                self.slots[block * size + i] = content

    def _apply(self, plan: StepPlan) -> None:
        for row in plan.released.tolist():
            del self.rows[row]
        for admission in plan.admitted:
            assert admission.row not in self.rows, "admitted into a row in use"
            self.rows[admission.row] = []
            self.chains[admission.row] = []
            for token in admission.token_ids.tolist():
                self._append(admission.row, token, hash_of_salt(self.salts[admission.seed]))
            self.admitted_len[admission.row] = len(admission.token_ids)
        changed = plan.block_tables, plan.block_rows, plan.block_cols
        cells = list(zip(*(each.tolist() for each in changed), strict=True))
        assert len(set(cells)) == len(cells), "a block-table cell changes twice in a step"
        self.tables[changed] = plan.block_ids

    def _append(self, row: int, token: int, root: int = 0) -> None:
        chain = self.chains[row]
        self.rows[row].append(token)
        chain.append(fold(chain[-1] if chain else root, token))

    def _slot(self, table: int, row: int, position: int) -> int:
        block = int(self.tables[table, row, position // self.block_size])
        assert block > 0, f"row {row} has no block for position {position} in table {table}"
        return block * self.block_size + position % self.block_size

    def _read(self, row: int, start: int, end: int) -> None:
        for table, window in enumerate(self.windows):
            for position in range(0 if window is None else max(0, start - window + 1), end):
                assert self.slots.get(self._slot(table, row, position)) == (table, self.chains[row][position]), (
                    f"row {row} reads a wrong KV at position {position} of table {table}"
                )


class FakeEngine:
    """Scheduler, KV and device with `depth` steps in flight while the next is planned; checks every step."""

    def __init__(
        self,
        *,
        num_blocks: int = 65,
        block_size: int = 4,
        window: int | None = None,
        groups: KVGroups | None = None,
        depth: int = 0,
        prefix_cache: bool = True,
        connector: FakeConnector | None = None,
        background: Delayed | None = None,
        num_host_blocks: int = 0,
        repeats: int = 0,
        **config: object,
    ) -> None:
        defaults: dict[str, object] = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64}
        self.config = SchedulerConfig(**{**defaults, **config})  # type: ignore[arg-type]
        self.kv = KVManager(
            one_group(block_size, window) if groups is None else groups,
            num_pages=num_blocks,
            max_num_seqs=self.config.max_num_seqs,
            max_model_len=self.config.max_model_len,
            enable_prefix_cache=prefix_cache,
            num_host_pages=num_host_blocks,
        )
        self.background = background
        self.scheduler = Scheduler(self.config, self.kv, connector, background)
        self.salts: dict[int, str] = {}
        self.device = FakeDevice(self.kv, self.salts, connector, repeats)
        self.depth = depth
        self.pending: deque[tuple[StepPlan, StepResult]] = deque()
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.deltas: list[TokenDelta] = []

    def add(
        self, prompt: list[int], *, name: str | None = None, salt: str = "", priority: int = 0,
        eos: tuple[int, ...] = (), tag: int = 0, **sampling: object,
    ) -> str:  # fmt: skip
        seed = len(self.requests)
        name = name or f"r{seed}"
        request = Request(
            id=name,
            prompt_token_ids=prompt,
            sampling=SamplingParams(seed=seed, **sampling),  # type: ignore[arg-type]
            eos_token_ids=eos,
            priority=priority,
            cache_salt=salt,
            tag=tag,
        )
        self.scheduler.add(request)
        self.salts[seed] = salt
        self.requests[name] = request
        self.outputs[name] = []
        return name

    def abort(self, name: str) -> bool:
        known = self.scheduler.abort(name)
        if known:
            self.reasons[name] = "abort"
        return known

    def step(self) -> StepPlan | None:
        """Plan and launch one step; take the oldest result when more than `depth` steps are in flight."""
        if self.background is not None:
            self.background.tick()
        plan = self.scheduler.schedule()
        self.kv.check()
        if plan is not None:
            self._check_plan(plan)
            self.pending.append((plan, self.device.execute(plan)))
        if self.pending and (plan is None or len(self.pending) > self.depth):
            self.update()
        return plan

    def update(self) -> list[TokenDelta]:
        gained = self.scheduler.update(*self.pending.popleft())
        deltas = list(gained)
        assert len({delta.request_id for delta in deltas}) == len(gained) == len(deltas), "a request twice in a step"
        self.kv.check()
        for delta in deltas:
            assert delta.request_id not in self.reasons, "a token after the end"
            self.outputs[delta.request_id] += delta.token_ids
            if delta.finish_reason:
                self.reasons[delta.request_id] = delta.finish_reason
        self.deltas += deltas
        return deltas

    def run(self, limit: int = 5000) -> None:
        """Step until every request has ended and nothing is in flight; then everything must be free."""
        for _ in range(limit):
            if not self.scheduler.has_work and not self.pending:
                break
            outstanding = bool(self.pending) or bool(self.scheduler.state.arriving)
            assert self.step() is not None or outstanding or self.scheduler.state.arriving, "no progress"
        assert not self.scheduler.has_work, "a request never ends"
        assert self.reasons.keys() == self.requests.keys()
        assert self.kv.pool.num_used == 0
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.host_blocks_used) == (0, 0, 0, 0)

    def check_outputs(self) -> None:
        """Every request that was not aborted gave the tokens it gives alone; an aborted one, a part of them."""
        for name, request in self.requests.items():
            tokens, reason = generate_alone(request, self.scheduler.max_model_len, self.device.repeats)
            if self.reasons[name] == "abort":
                assert self.outputs[name] == tokens[: len(self.outputs[name])]
            else:
                assert (self.outputs[name], self.reasons[name]) == (tokens, reason)

    def _check_plan(self, plan: StepPlan) -> None:
        config = self.config
        decodes_only = plan.first_chunk == len(plan.rows)
        most = max(config.max_num_batched_tokens, config.max_num_seqs * decodes_only)
        assert 0 < plan.total_tokens <= most
        if config.max_prefill_requests is not None and not decodes_only:
            assert len(plan.rows) <= config.max_prefill_requests
        assert len(set(plan.rows.tolist())) == len(plan.rows), "a row twice in a step"
        if plan.num_verifies:
            assert config.speculation is not None
            assert max(plan.num_tokens[plan.num_decodes : plan.first_chunk]) <= config.speculation.tokens + 1
            assert len(plan.unrolled().rows) <= (config.max_prefill_requests or max(config.max_num_seqs, MOST_SCORED))
        assert (plan.num_tokens >= 1).all()
        if not config.mixed_steps:
            assert plan.first_chunk in (0, len(plan.rows)), "a mixed step"
        assert plan.samples[:-1].all(), "something is planned after a prefill that is not planned to its end"
        if not config.chunked_prefill:
            assert plan.samples.all(), "a chunk of a prompt"
