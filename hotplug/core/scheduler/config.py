"""What bounds a step, and the order in which requests start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hotplug.core.errors import ConfigError
from hotplug.core.scheduler.drafter import Speculation
from hotplug.core.scheduler.policy import FCFS, SchedulingPolicy

MOST_SCORED = 64
"""Tokens with scores that a step may have however few requests may run: bounds the memory that proposals take."""


class ShortPrompts(NamedTuple):
    """The most of prompts that a step may hold for the device to start it at once, as it does a step of decodes."""

    tokens: int
    chunks: int


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
