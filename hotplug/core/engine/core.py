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
from hotplug.core.ops.registry import Observe
from hotplug.core.parallel.executor import PendingStep
from hotplug.core.platform.discovery import Candidate
from hotplug.core.request import EngineStats, Request
from hotplug.core.runner.memory_guard import step_guard
from hotplug.core.runner.timing import PLAN, UPDATE, WAIT
from hotplug.core.scheduler.plan import StepPlan
from hotplug.core.scheduler.tokens import StepTokens, token_array
from hotplug.core.startup.start import start

IDLE = 0.005
"""Seconds that the loop waits for KV blocks at most where every request waits for some; requests can come meanwhile."""

_logger = logging.getLogger(__name__)


class EngineCore:
    """The scheduler, the executor, and the step that ties the two together.

    It knows neither how many ranks there are nor how a step runs: that is the executor's.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        observe: Observe | None = None,
        candidates: Sequence[Candidate] | None = None,
    ) -> None:
        """Start the engine; takes as long as its weights do. Raises what `hotplug.core.startup.start.start` raises."""
        started = start(config, observe=observe, candidates=candidates)
        self.bound = bound = started.bound
        self.num_blocks = started.num_blocks
        self._startup = started.figures
        self._executor, self._scheduler = started.executor, started.scheduler
        self._ahead = self._executor.ahead
        self._in_flight: deque[tuple[StepPlan, PendingStep]] = deque()
        self._failure = ""
        self._step_guard = step_guard(bound.placement.selection)
        self.timer = self._executor.timer
        """The phases of its steps; whoever hands the results of a step over calls `sent`."""
        self._reference_ops = len(bound.kernels.plan.reference_sites) if bound.kernels.plan.accelerator else 0
        if bound.kernels.tracer is not None:
            bound.kernels.tracer.reset()  # profile steps are not the user's
        try:
            self._announce()
        except BaseException:  # a warning may be an error
            self.close()
            raise

    def _announce(self) -> None:
        """Tell the log what was started, and warn of reference ops."""
        weights, seconds = self.bound.kernels.weights, self._startup["seconds"]
        _logger.info("weights: %s, %s", weights.name, weights.reason)
        _logger.info("started: %s", ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items()))
        if self._reference_ops:
            warnings.warn(
                f"{self._reference_ops} call sites run a plain-PyTorch reference on "
                f"{self.bound.placement.platform.name}; `hotplug explain` says which and why",
                stacklevel=3,
            )

    def close(self) -> None:
        """End the other ranks' processes, if there are any: no step can run then. An engine's end does so too."""
        self._executor.close()

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
        return self.bound.options.resolved.max_num_seqs

    @property
    def plan_hash(self) -> str:
        return self.bound.kernels.plan.hash

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
        self.check()
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
            self.bound.rows.sampler.check_processors(request.sampling)
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
        self.check()
        try:
            with self._step_guard:
                return self._step()
        except BaseException as e:
            self._failure = f"{type(e).__name__}: {e}"
            dead = self._executor.blame(e)
            self.close()
            if dead is not None and dead is not e:
                self._failure = str(dead)
                raise dead from e
            raise

    def check(self) -> None:
        """Raises EngineDeadError after a failed step, after `close`, and where another rank's process has ended."""
        if self._failure:
            raise EngineDeadError("a step failed", why=self._failure, hint="Start a new engine.")
        try:
            self._executor.check()
        except EngineDeadError as e:
            if not self._executor.closed:
                self._failure = str(e)
                self.close()
            raise

    @property
    def sentinels(self) -> tuple[int, ...]:
        """File descriptors that become readable when another rank's process has ended."""
        return self._executor.sentinels

    def _step(self) -> StepTokens:
        timer = self.timer
        timer.begin()
        plan = self._scheduler.schedule()
        timer.lap(PLAN)
        if plan is not None:
            if timer.recorder is not None:
                timer.recorder.launched(len(plan.rows), int(plan.num_tokens.sum()))
            self._in_flight.append((plan, self._executor.execute(plan)))
            if len(self._in_flight) <= self._ahead:
                return StepTokens()
        if not self._in_flight:
            self._scheduler.residency.wait(IDLE)
            return StepTokens()
        oldest, handle = self._in_flight.popleft()
        result = handle.result()
        timer.lap(WAIT)
        gained = self._scheduler.update(oldest, result)
        timer.lap(UPDATE)
        if not self.has_work:  # nobody knows when the next step will be
            self._executor.save(self._scheduler.take_saves())
        return gained

    def wait_until_compiled(self) -> None:
        """Return when no step runs op by op for want of an executable. Raises PlatformError if compiling failed."""
        self._executor.wait_until_ready()

    def stats(self) -> EngineStats:
        stats = self._scheduler.stats()
        stats.reference_ops = self._reference_ops
        stats.recompiles = self._executor.recompiles
        stats.phase_ns, stats.step_buckets = self.timer.nanoseconds.copy(), self.timer.buckets.copy()
        return stats

    def report(self) -> dict[str, Any]:
        """The bound plan as plain data, with the KV cache as allocated."""
        report = self.bound.report()
        report["kv"]["num_blocks"] = self.num_blocks
        report["startup"] = self._startup
        report["speculative"] = self._speculative_report()
        report |= self._executor.report()
        if self.bound.kernels.tracer is not None:
            report["trace"] = self.trace()
        return report

    def _speculative_report(self) -> dict[str, Any]:
        """How requests speculate, and what became of their proposals so far."""
        config, stats = self.bound.config, self._scheduler.stats()
        return {
            "available": self.bound.options.resolved.speculates,
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
        if self.bound.kernels.tracer is None:
            raise ConfigError("ops are not traced", hint="Start with --trace-ops.")
        return self.bound.kernels.tracer.report(self._scheduler.stats().steps)
