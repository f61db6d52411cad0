"""EngineCore: the loop of plan, execute, update. Token ids in, token ids out; no text, no sockets."""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from hotplug.core.config import EngineConfig
from hotplug.core.errors import ConfigError, EngineDeadError, HotplugError, RequestError
from hotplug.core.kv.manager import KVManager
from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.models.loader import load_weights
from hotplug.core.models.repack import repack_weights
from hotplug.core.ops.registry import Observe
from hotplug.core.ops.trace import synchronizer
from hotplug.core.parallel.encoding import encode_plan
from hotplug.core.parallel.peers import Peers
from hotplug.core.parallel.workers import Workers
from hotplug.core.platform.base import ExecMode
from hotplug.core.platform.discovery import Candidate
from hotplug.core.platform.optional import HasRuntime, HasWeights
from hotplug.core.request import EngineStats, Request
from hotplug.core.runner import kv_memory, memory_guard
from hotplug.core.runner.capture import CapturedSteps
from hotplug.core.runner.compile import CompiledSteps
from hotplug.core.runner.executable import EagerStep
from hotplug.core.runner.memory_guard import MemoryGuard
from hotplug.core.runner.profile import run_largest_steps
from hotplug.core.runner.runner import Runner, StepHandle
from hotplug.core.runner.static import StepShape
from hotplug.core.runner.timing import PLAN, UPDATE, WAIT
from hotplug.core.scheduler.config import MOST_SCORED, SchedulerConfig
from hotplug.core.scheduler.drafter import Speculation
from hotplug.core.scheduler.plan import StepPlan
from hotplug.core.scheduler.scheduler import Scheduler
from hotplug.core.scheduler.tokens import StepTokens, token_array
from hotplug.core.startup.bind import Bound, bind
from hotplug.core.startup.connect import make_connector, make_transfer
from hotplug.core.startup.executables import (
    captured,
    captured_prompts,
    captured_shapes,
    compiled,
    compiled_shapes,
    graph_memory,
    short_prompts,
)
from hotplug.core.startup.phases import Phases
from hotplug.core.startup.rank_processes import give_share_back, start_workers, take_share
from hotplug.core.startup.swap import make_space, make_swap
from hotplug.core.startup.warmup import WarmUp

_logger = logging.getLogger(__name__)


class RankCore:
    """One model on one device, or one rank's part of it: bound and loaded, with its cache and its runner."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        observe: Observe | None = None,
        candidates: Sequence[Candidate] | None = None,
        peers: Peers | None = None,
    ) -> None:
        """`peers` are the other ranks, as a worker sees them; rank 0 starts its own (`self._workers`)."""
        self._workers: Workers | None = None
        phases = Phases()
        with phases("bind"):
            rank = 0 if peers is None else peers.rank
            self.bound = bound = bind(config, observe=observe, candidates=candidates, rank=rank)
            shapes, bounds = compiled_shapes(bound) or ((), None)
            connector = make_connector(bound)
        platform, device = bound.selection.platform, bound.selection.device
        if config.kv_cache_memory is not None:  # what is not there now is not there once the weights are
            kv_memory.budget(config, bound.limits, platform.memory(device))
        if config.tensor_parallel_size > 1:
            take_share(bound)
            if peers is None:
                peers = self._workers = start_workers(bound)
        warm_up = WarmUp(bound)
        with phases("weights"):
            with MemoryGuard("loading the weights", bound.selection, memory_guard.WEIGHTS):
                load_weights(bound.model, bound.checkpoint)
                if isinstance(platform, HasWeights) and observe is None and not shapes:
                    repack_weights(bound.model, bound.plan, platform, bound.checkpoint)
                bound.checkpoint.release()
            space = make_space(bound)
            synchronizer(platform, device, bound.batch.device)()
        if peers is not None:
            with phases("ranks"):
                peers.join(bound.plan.hash)
        with phases("kernels"):
            warm_up.wait()
            if warm_up.outcome not in ("none", "done"):
                _logger.warning("kernels are made when first launched, since compiling them ahead failed: %s",
                                warm_up.outcome)  # fmt: skip
        with phases("profile"):
            num_blocks, reserved = _num_blocks(bound)
            if peers is not None:
                num_blocks = peers.agree(num_blocks)
        with phases("cache"):
            cache = _cache(bound, num_blocks)
        with phases("steps"):
            free = platform.memory(device).free
            with MemoryGuard("preparing the steps", bound.selection, memory_guard.EXECUTABLES):
                self._executable = _executable(bound, cache, shapes)
            taken = free - platform.memory(device).free
        transfer, swap = make_transfer(bound, cache, connector), make_swap(bound, cache, space)
        runtime = platform if isinstance(platform, HasRuntime) else None
        self._runner = Runner(bound.model, bound.batch, bound.sampler, self._executable, transfer, runtime, swap)
        self.timer = self._runner.timer
        """The phases of its steps; whoever hands the results of a step over calls `sent`."""
        self._step_guard = MemoryGuard("running a step", bound.selection, memory_guard.STEP)
        if self._workers is not None:
            self._workers.ready()
        self.num_blocks = num_blocks
        self._bounds, self._connector = bounds, connector
        memory = {"reserved": reserved, "taken": taken}
        self._startup: dict[str, Any] = {"seconds": phases.report(), "steps_memory": memory,
                                         "warm_up": warm_up.outcome}  # fmt: skip

    def execute(self, plan: StepPlan) -> StepHandle:
        """Run a step on this rank. Raises OutOfMemoryError, or whatever a kernel raises."""
        with self._step_guard:
            return self._runner.execute(plan)

    def close(self) -> None:
        """End the other ranks' processes, if there are any: no step can run then. An engine's end does so too."""
        if self._workers is not None and self._workers.close.alive:
            if isinstance(executable := getattr(self, "_executable", None), CapturedSteps):
                executable.release()  # what is recorded may hold on to the group's connections
            self._workers.close()
            give_share_back(self.bound)


class EngineCore(RankCore):
    """The scheduler, and the step that ties it to the runner: of one rank, or of rank 0, which leads the others."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        observe: Observe | None = None,
        candidates: Sequence[Candidate] | None = None,
    ) -> None:
        try:
            super().__init__(config, observe=observe, candidates=candidates)
        except BaseException:
            self.close()
            raise
        bound, num_blocks, bounds, connector = self.bound, self.num_blocks, self._bounds, self._connector
        self._ahead = int(bound.limits.asynchronous)
        self._in_flight: deque[tuple[StepPlan, StepHandle]] = deque()
        self._failure = ""
        kv = KVManager(
            bound.groups,
            num_pages=num_blocks,
            max_num_seqs=bound.resolved.max_num_seqs,
            max_model_len=bound.context.max_position,
            enable_prefix_cache=config.enable_prefix_cache,
            num_host_pages=bound.swap_blocks,
        )
        budget = bound.resolved.max_num_batched_tokens
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=bound.resolved.max_num_seqs,
                max_num_batched_tokens=budget if bounds is None else min(budget, bounds.max_tokens),
                max_prefill_requests=None if bounds is None else bounds.max_requests,
                max_model_len=bound.max_model_len,
                policy=bound.policy,
                chunked_prefill=config.enable_chunked_prefill,
                mixed_steps=bound.limits.mixed_steps,
                short_prompts=short_prompts(bound),
                max_queue=config.max_queue,
                seed=config.seed,
                speculation=_speculation(bound),
            ),
            kv,
            connector,
        )
        self._reference_ops = len(bound.plan.reference_sites) if bound.plan.accelerator else 0
        if self._reference_ops:
            warnings.warn(
                f"{self._reference_ops} call sites run a plain-PyTorch reference on "
                f"{bound.selection.platform.name}; `hotplug explain` says which and why",
                stacklevel=2,
            )
        if bound.tracer is not None:
            bound.tracer.reset()  # profile steps are not the user's
        seconds: dict[str, float] = self._startup["seconds"]
        _logger.info("weights: %s, %s", bound.weights.name, bound.weights.reason)
        _logger.info("started: %s", ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items()))

    @property
    def max_model_len(self) -> int:
        """Longest sequence that can be served: less than the configured where the KV pool is smaller."""
        return self._scheduler.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.bound.checkpoint.config.vocab_size

    @property
    def max_num_seqs(self) -> int:
        """Requests that run at once."""
        return self.bound.resolved.max_num_seqs

    @property
    def plan_hash(self) -> str:
        return self.bound.plan.hash

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence: what the checkpoint says, as far as they are in the vocabulary."""
        return self._in_vocabulary(self.bound.checkpoint.config.eos_token_ids)

    def _in_vocabulary(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """`token_ids` itself where all are. A token that is not can never come, and would index past the scores."""
        size = self.vocab_size
        if all(isinstance(token, int) and 0 <= token < size for token in token_ids):
            return token_ids
        return tuple(token for token in token_ids if isinstance(token, int) and 0 <= token < size)

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._in_flight)

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError or QueueFullError, and goes on; EngineDeadError after a failed step."""
        self._require_alive()
        prompt, ends = token_array(request.prompt_token_ids), self._in_vocabulary(request.eos_token_ids)
        if prompt is not request.prompt_token_ids or ends is not request.eos_token_ids:
            request = msgspec.structs.replace(request, prompt_token_ids=prompt, eos_token_ids=ends)
        self._check_token_ids(request)
        self._check_processors(request)
        self._scheduler.add(request)

    def _check_token_ids(self, request: Request) -> None:
        """A token id outside the vocabulary would be found by an indexing kernel, in the middle of a step."""
        sampling, prompt = request.sampling, np.asarray(request.prompt_token_ids)
        for param, least, most in (
            ("prompt", int(prompt.min(initial=0)), int(prompt.max(initial=0))),
            ("stop_token_ids", min(sampling.stop_token_ids, default=0), max(sampling.stop_token_ids, default=0)),
            ("logit_bias", min(sampling.logit_bias or (), default=0), max(sampling.logit_bias or (), default=0)),
        ):
            if least < 0 or most >= self.vocab_size:
                raise RequestError(f"{param} has a token id outside the vocabulary of {self.vocab_size}", param=param)
        if sampling.min_tokens:
            ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else request.eos_token_ids)}
            if len(ends) >= self.vocab_size:  # all ids are in the vocabulary, here
                raise RequestError("min_tokens leaves no token: every token of the vocabulary ends the request",
                                   param="min_tokens", hint="Lower it to 0, or name fewer stop_token_ids.")  # fmt: skip
        for param in ("logprobs", "prompt_logprobs"):
            wanted = getattr(sampling, param)
            if wanted is not None and wanted > self.vocab_size:
                raise RequestError(f"{param} is above the vocabulary of {self.vocab_size}", param=param)

    def _check_processors(self, request: Request) -> None:
        """Make the request's processors once, to see whether they take their arguments: they are a plugin's code."""
        try:
            self.bound.sampler.check_processors(request.sampling)
        except HotplugError:
            raise
        except Exception as e:
            raise RequestError(f"a logits processor failed on its arguments: {e!r}", param="logits_processors") from e

    @property
    def requests(self) -> list[Request]:
        """Those that have not ended."""
        return self._scheduler.requests

    def abort(self, request_id: str) -> bool:
        """End a request wherever it is and free its blocks. False if it is unknown, or over."""
        return self._scheduler.abort(request_id)

    def step(self) -> StepTokens:
        """Plan and launch one step, and return what the oldest in flight added to which request.

        On an asynchronous device one step stays in flight: its results come with the next call.
        Raises OutOfMemoryError, or whatever a kernel raises; after that, and after an interrupt, EngineDeadError:
        blocks that other requests would share may lack what the step was to write.
        """
        self._require_alive()
        try:
            with self._step_guard:
                return self._step()
        except BaseException as e:
            self._failure = f"{type(e).__name__}: {e}"
            if self._workers is not None:
                dead = self._workers.blame(e)
                self.close()
                if dead is not None and dead is not e:
                    self._failure = str(dead)
                    raise dead from e
            raise

    def _require_alive(self) -> None:
        if self._failure:
            raise EngineDeadError("a step failed", why=self._failure, hint="Start a new engine.")
        self.check_ranks()

    @property
    def sentinels(self) -> tuple[int, ...]:
        """File descriptors that become readable when another rank's process has ended."""
        return () if self._workers is None or not self._workers.close.alive else self._workers.sentinels

    def check_ranks(self) -> None:
        """Raises EngineDeadError if another rank's process has ended."""
        if self._workers is None:
            return
        if not self._workers.close.alive:
            raise EngineDeadError("the engine was closed")
        try:
            self._workers.check()
        except EngineDeadError as e:
            self._failure = str(e)
            self.close()
            raise

    def _step(self) -> StepTokens:
        timer = self.timer
        timer.begin()
        plan = self._scheduler.schedule()
        timer.lap(PLAN)
        if plan is not None:
            if timer.recorder is not None:
                timer.recorder.launched(len(plan.rows), int(plan.num_tokens.sum()))
            if self._workers is not None:
                self._workers.send(encode_plan(plan))
            self._in_flight.append((plan, self._runner.execute(plan)))
            if len(self._in_flight) <= self._ahead:
                return StepTokens()
        if not self._in_flight:
            return StepTokens()
        oldest, handle = self._in_flight.popleft()
        result = handle.result()
        timer.lap(WAIT)
        gained = self._scheduler.update(oldest, result)
        timer.lap(UPDATE)
        if not self.has_work:  # nobody knows when the next step will be
            self._runner.save(self._scheduler.take_saves())
        return gained

    def wait_until_compiled(self) -> None:
        """Return when no step runs op by op for want of an executable. Raises PlatformError if compiling failed."""
        if isinstance(self._executable, CompiledSteps):
            self._executable.wait()

    def stats(self) -> EngineStats:
        stats = self._scheduler.stats()
        stats.reference_ops = self._reference_ops
        stats.recompiles = self._executable.recompiles
        stats.phase_ns, stats.step_buckets = self.timer.nanoseconds.copy(), self.timer.buckets.copy()
        return stats

    def report(self) -> dict[str, Any]:
        """The bound plan as plain data, with the KV cache as allocated."""
        report = self.bound.report()
        report["kv"]["num_blocks"] = self.num_blocks
        report["startup"] = self._startup
        report["speculative"] = self._speculative_report()
        report["shapes"] = [list(shape) for shape in self._executable.shapes]
        if isinstance(self._executable, CompiledSteps):
            report["compiled"] = self._executable.report()
        if self.bound.tracer is not None:
            report["trace"] = self.trace()
        return report

    def _speculative_report(self) -> dict[str, Any]:
        """How requests speculate, and what became of their proposals so far."""
        config, stats = self.bound.config, self._scheduler.stats()
        return {
            "available": self.bound.resolved.speculates,
            "default": config.speculative,
            "tokens": config.speculative_tokens,
            "ngram": [config.speculative_ngram_min, config.speculative_ngram_max],
            "max_requests": config.speculative_max_requests,
            "verifications": stats.verifications,
            "proposed_tokens": stats.proposed_tokens,
            "accepted_tokens": stats.accepted_tokens,
        }

    def trace(self) -> dict[str, Any]:
        """What `trace_ops` has timed so far (`hotplug.core.ops.trace`). Raises ConfigError without it."""
        if self.bound.tracer is None:
            raise ConfigError("ops are not traced", hint="Start with --trace-ops.")
        return self.bound.tracer.report(self._scheduler.stats().steps)


def _num_blocks(bound: Bound) -> tuple[int, int]:
    """KV blocks that fit, and the bytes that recorded steps will take beside them.

    Weights are in place, and where the size follows from them, workspaces too.
    """
    config, limits, groups, selection = bound.config, bound.limits, bound.groups, bound.selection
    capped = config.kv_cache_memory is not None
    steps = 0
    if not capped and not limits.shared_host_memory and ExecMode.EAGER in limits.exec_modes:
        scratch = kv_memory.allocate(groups, 1, selection.platform, selection.device)
        with MemoryGuard("running the largest step", selection, memory_guard.PROFILE):
            run_largest_steps(
                Runner(bound.model, bound.batch, bound.sampler, EagerStep(bound.model, scratch, bound.batch)),
                max_num_seqs=bound.resolved.max_num_seqs,
                max_num_batched_tokens=bound.resolved.max_num_batched_tokens,
                max_model_len=bound.max_model_len,
                max_verified=MOST_SCORED if bound.resolved.speculates else 0,
            )
            memory = selection.platform.memory(selection.device)
            steps = graph_memory(bound, scratch)  # what it has taken need not be free at once
    else:
        memory = selection.platform.memory(selection.device)
    size = kv_memory.budget(config, limits, memory, bound.sharing) - steps
    chunk = bound.resolved.max_num_batched_tokens
    found = kv_memory.num_pages(groups, size, bound.max_model_len, chunk, capped=capped)
    compiles = bound.resolved.exec_mode is ExecMode.COMPILE
    # The number is a shape of compiled programs: a rounded one finds its artifacts again at the next start.
    return (kv_memory.rounded(found) if compiles and not capped else found), steps


def _cache(bound: Bound, num_blocks: int) -> list[KVBlocks]:
    """The KV cache. Raises OutOfMemoryError."""
    capped = bound.config.kv_cache_memory is not None
    hint = memory_guard.KV_CACHE_CAPPED if capped else memory_guard.KV_CACHE
    asked = num_blocks * bound.groups.page_bytes
    with MemoryGuard("allocating the KV cache", bound.selection, hint, asked=asked):
        return kv_memory.allocate(bound.groups, num_blocks, bound.selection.platform, bound.selection.device)


def _executable(
    bound: Bound, kv: list[KVBlocks], shapes: Sequence[StepShape]
) -> EagerStep | CapturedSteps | CompiledSteps:
    """What runs the steps. `shapes` are those to compile."""
    eager = EagerStep(bound.model, kv, bound.batch)
    match bound.resolved.exec_mode:
        case ExecMode.EAGER:
            return eager
        case ExecMode.CAPTURE:
            return captured(bound, eager, captured_shapes(bound), captured_prompts(bound))
        case ExecMode.COMPILE:
            return compiled(bound, shapes, kv, eager)


def _speculation(bound: Bound) -> Speculation | None:
    """How requests speculate; None where the platform cannot."""
    if not bound.resolved.speculates:
        return None
    config = bound.config
    return Speculation(
        by_default=config.speculative is not None,
        tokens=config.speculative_tokens,
        shortest=config.speculative_ngram_min,
        longest=config.speculative_ngram_max,
        max_requests=config.speculative_max_requests,
    )
