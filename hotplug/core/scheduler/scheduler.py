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

import time

import msgspec
import numpy as np

from hotplug.core.errors import PromptTooLongError, QueueFullError, RequestError
from hotplug.core.kv.manager import KVManager
from hotplug.core.kv.prefix import BlockHashes
from hotplug.core.request import EngineStats, Request
from hotplug.core.scheduler.config import SchedulerConfig
from hotplug.core.scheduler.plan import IntArray, StepPlan, StepResult
from hotplug.core.scheduler.planning import Planner
from hotplug.core.scheduler.policy import rank_of
from hotplug.core.scheduler.residency import Residency, Store
from hotplug.core.scheduler.results import Results
from hotplug.core.scheduler.sequence import Sequence
from hotplug.core.scheduler.speculator import Speculator
from hotplug.core.scheduler.state import SchedulerState
from hotplug.core.scheduler.tokens import StepTokens, token_array
from hotplug.core.transfer.background import Background, Immediate


class Scheduler:
    """Plans steps over the requests it was given; see the module's docstring for the protocol."""

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVManager,
        connector: Store | None = None,
        background: Background | None = None,
    ) -> None:
        """`background` runs what `connector` fetches; without one it is fetched at once."""
        self.config = config
        self.kv = kv
        self.state = SchedulerState(config, kv)
        self._speculator = Speculator(self.state)
        self.residency = Residency(self.state, connector, background or Immediate())
        self.planner = Planner(self.state, self.residency, self._speculator)
        self._results = Results(self.state, self.residency)
        self._arrivals = 0
        self._random = np.random.default_rng(config.seed)

    @property
    def max_model_len(self) -> int:
        """Longest sequence that can be served: the configured one, or less where the KV pool is smaller."""
        return self.state.max_model_len

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended. Results may be outstanding even when none is left."""
        return bool(self.state.requests)

    @property
    def requests(self) -> list[Request]:
        """Those that have not ended."""
        return [seq.request for seq in self.state.requests.values()]

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError, PromptTooLongError or QueueFullError."""
        prompt = self._checked_prompt(request)
        queued = len(self.state.waiting) + len(self.state.arriving)
        if queued >= self.config.max_queue + self.state.batch.num_free:
            batches = queued // self.config.max_num_seqs
            raise QueueFullError(f"{queued} requests are waiting", retry_after=1 + batches)
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
        self.state.waiting.push(seq)  # nothing after it can fail: a request is known as a whole or not at all
        self.state.requests[request.id] = seq
        self.state.num_speculating += drafter is not None

    def abort(self, request_id: str) -> bool:
        """End a request wherever it is; its blocks are free at once. False when it is not known (any more)."""
        seq = self.state.requests.get(request_id)
        if seq is None:
            return False
        self.state.end(seq)
        return True

    def stats(self) -> EngineStats:
        """A snapshot; `reference_ops` is the engine's to fill."""
        self.state.stats.running = self.state.batch.num_running
        self.state.stats.waiting = len(self.state.waiting)
        self.state.stats.waiting_for_kv = len(self.state.arriving)
        self.state.stats.kv_blocks_used = self.kv.pool.num_used
        if self.kv.host is not None:
            self.state.stats.host_blocks_used = self.kv.host.blocks.num_used
        return msgspec.structs.replace(self.state.stats)

    def _checked_prompt(self, request: Request) -> IntArray:
        if request.id in self.state.requests:
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

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run before a request is added or a step in flight is updated."""
        return self.planner.schedule()

    def update(self, plan: StepPlan, result: StepResult) -> StepTokens:
        """Take the results of the oldest plan in flight; ends requests and returns what each request gained.

        Tokens of requests that ended while the step was in flight are dropped. Raises ValueError when `plan` is
        not the oldest in flight.
        """
        return self._results.update(plan, result)

    def take_saves(self) -> list[tuple[int, bytes]]:
        """Blocks to hand to the connector, with their hashes, before any later step is run."""
        return self.residency.take_saves()
