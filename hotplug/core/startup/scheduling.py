"""The last stage of a start: the scheduler, with what the options and the prepared steps allow a step to hold."""

from __future__ import annotations

from hotplug.core.runner.compile import StepBounds
from hotplug.core.scheduler.config import SchedulerConfig
from hotplug.core.scheduler.drafter import Speculation
from hotplug.core.scheduler.scheduler import Scheduler
from hotplug.core.startup.bind import Bound
from hotplug.core.startup.executables import short_prompts
from hotplug.core.transfer.background import Background
from hotplug.core.transfer.connector import KVConnector


def make_scheduler(
    bound: Bound,
    num_blocks: int,
    bounds: StepBounds | None,
    connector: KVConnector | None,
    background: Background,
) -> Scheduler:
    """The scheduler of an engine with `num_blocks` KV blocks. `bounds` are those of compiled steps. Raises ConfigError
    for options that could not make progress."""
    config, resolved = bound.config, bound.options.resolved
    kv = bound.kv.manager(num_blocks, resolved, prefix_cache=config.enable_prefix_cache)
    budget = resolved.max_num_batched_tokens
    limits = SchedulerConfig(
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=budget if bounds is None else min(budget, bounds.max_tokens),
        max_prefill_requests=None if bounds is None else bounds.max_requests,
        max_model_len=bound.options.max_model_len,
        policy=bound.policy,
        chunked_prefill=config.enable_chunked_prefill,
        mixed_steps=bound.placement.limits.mixed_steps,
        short_prompts=short_prompts(bound),
        max_queue=config.max_queue,
        seed=config.seed,
        speculation=_speculation(bound),
    )
    return Scheduler(limits, kv, connector, background)


def _speculation(bound: Bound) -> Speculation | None:
    """How requests speculate; None where the platform cannot."""
    if not bound.options.resolved.speculates:
        return None
    config = bound.config
    return Speculation(
        by_default=config.speculative is not None,
        tokens=config.speculative_tokens,
        shortest=config.speculative_ngram_min,
        longest=config.speculative_ngram_max,
        max_requests=config.speculative_max_requests,
    )
