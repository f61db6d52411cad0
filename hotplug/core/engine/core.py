"""EngineCore: the loop of plan, execute, update. Token ids in, token ids out; no text, no sockets."""

from __future__ import annotations

import warnings
from typing import Any

from hotplug.core.config import EngineConfig
from hotplug.core.engine.bind import Bound, bind
from hotplug.core.errors import PlatformError, RequestError
from hotplug.core.kv.groups import KVGroup
from hotplug.core.kv.manager import KVManager
from hotplug.core.models.loader import load_weights
from hotplug.core.platform.base import ExecMode
from hotplug.core.platform.optional import HasCapture
from hotplug.core.request import EngineStats, Request, TokenDelta
from hotplug.core.runner import kv_memory
from hotplug.core.runner.capture import CapturedSteps, decode_shapes
from hotplug.core.runner.executable import EagerStep
from hotplug.core.runner.profile import run_largest_steps
from hotplug.core.runner.runner import Runner
from hotplug.core.scheduler.scheduler import Scheduler, SchedulerConfig


class EngineCore:
    """One model on one device: the scheduler, the runner, and the step that ties them."""

    def __init__(self, config: EngineConfig) -> None:
        self.bound = bound = bind(config)
        load_weights(bound.model, bound.checkpoint)
        num_blocks = _num_blocks(bound)
        cache = kv_memory.allocate(bound.kv_shape, num_blocks, bound.selection.platform, bound.selection.device)
        eager = EagerStep(bound.model, cache)
        captured = _captured(bound, eager)
        self._shapes = captured.shapes if captured is not None else ()
        self._runner = Runner(bound.model, bound.batch, bound.sampler, captured or eager)
        kv = KVManager(
            _kv_group(bound),
            num_blocks=num_blocks,
            max_num_seqs=config.max_num_seqs,
            max_model_len=bound.max_model_len,
            enable_prefix_cache=config.enable_prefix_cache,
        )
        self.num_blocks = num_blocks
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=bound.max_model_len,
                policy=config.scheduling,
                chunked_prefill=config.enable_chunked_prefill,
                mixed_steps=bound.limits.mixed_steps,
                max_queue=config.max_queue,
                seed=config.seed,
            ),
            kv,
        )
        self._reference_ops = len(bound.plan.reference_sites) if bound.plan.accelerator else 0
        if self._reference_ops:
            warnings.warn(
                f"{self._reference_ops} call sites run a plain-PyTorch reference on "
                f"{bound.selection.platform.name}; `hotplug explain` says which and why",
                stacklevel=2,
            )

    @property
    def max_model_len(self) -> int:
        """Longest sequence that can be served: less than the configured where the KV pool is smaller."""
        return self._scheduler.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.bound.checkpoint.config.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence, as the checkpoint says."""
        return self.bound.checkpoint.config.eos_token_ids

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError or QueueFullError; the engine goes on."""
        self._check_token_ids(request)
        self._scheduler.add(request)

    def _check_token_ids(self, request: Request) -> None:
        """A token id outside the vocabulary would be found by an indexing kernel, in the middle of a step."""
        sampling = request.sampling
        for param, ids in (
            ("prompt", request.prompt_token_ids),
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", sampling.logit_bias or ()),
        ):
            if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
                raise RequestError(f"{param} has a token id outside the vocabulary of {self.vocab_size}", param=param)
        for param in ("logprobs", "prompt_logprobs"):
            wanted = getattr(sampling, param)
            if wanted is not None and wanted > self.vocab_size:
                raise RequestError(f"{param} is above the vocabulary of {self.vocab_size}", param=param)

    def abort(self, request_id: str) -> bool:
        """End a request wherever it is and free its blocks. False if it is unknown, or over."""
        return self._scheduler.abort(request_id)

    def step(self) -> list[TokenDelta]:
        """Plan one step, run it, and return what it added to which request."""
        plan = self._scheduler.schedule()
        if plan is None:
            return []
        return self._scheduler.update(plan, self._runner.execute(plan).result())

    def stats(self) -> EngineStats:
        stats = self._scheduler.stats()
        stats.reference_ops = self._reference_ops
        return stats

    def report(self) -> dict[str, Any]:
        """The bound plan as plain data, with the KV cache as allocated."""
        report = self.bound.report()
        report["kv"]["num_blocks"] = self.num_blocks
        report["shapes"] = [list(shape) for shape in self._shapes]
        return report


def _num_blocks(bound: Bound) -> int:
    """KV blocks that fit, with the weights in place and, where the size follows from them, the workspaces."""
    config, limits, shape, selection = bound.config, bound.limits, bound.kv_shape, bound.selection
    capped = config.kv_cache_memory is not None
    if not capped and not limits.shared_host_memory:
        scratch = kv_memory.allocate(shape, 1, selection.platform, selection.device)
        run_largest_steps(
            Runner(bound.model, bound.batch, bound.sampler, EagerStep(bound.model, scratch)),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=bound.max_model_len,
        )
    size = kv_memory.budget(config, limits, selection.platform.memory(selection.device))
    return kv_memory.num_blocks(shape, size, bound.max_model_len, capped=capped)


def _captured(bound: Bound, eager: EagerStep) -> CapturedSteps | None:
    """Recorded decode steps, where the configuration settled on capture."""
    if bound.resolved.exec_mode is not ExecMode.CAPTURE:
        return None
    platform, device = bound.selection.platform, bound.selection.device
    if not isinstance(platform, HasCapture):
        raise PlatformError("the platform declares capture but has no `capture` method", where=platform.name)
    tables = bound.batch.block_tables
    return CapturedSteps(
        eager,
        platform,
        device,
        shapes=decode_shapes(bound.config.max_num_seqs, bound.limits.max_graph_shapes),
        max_blocks=tables.shape[1],
        index_dtype=tables.dtype,
        torch_device=tables.device,
    )


def _kv_group(bound: Bound) -> KVGroup:
    """Full attention unless every layer slides; then blocks behind the window are freed."""
    model = bound.checkpoint.config
    sliding = len(model.sliding_layers) == model.num_layers
    return KVGroup(block_size=bound.kv_shape.block_size, window=model.sliding_window if sliding else None)
