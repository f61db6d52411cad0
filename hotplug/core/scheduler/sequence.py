"""A request inside the scheduler: what must survive preemption, whichever row it has or has not."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import numpy as np

from hotplug.core.kv.host import Swapped
from hotplug.core.kv.prefix import BlockHashes
from hotplug.core.logprobs import PromptScores
from hotplug.core.request import Request
from hotplug.core.scheduler.drafter import Drafter
from hotplug.core.scheduler.plan import Admission, IntArray


class Status(enum.Enum):
    """What a request waits for, if it waits."""

    WAITING = enum.auto()
    """For a row, in the queue."""
    WAITING_FOR_KV = enum.auto()
    """For its KV blocks to come from a connector; others start meanwhile."""
    RUNNING = enum.auto()
    ENDED = enum.auto()


class Fetched(NamedTuple):
    """Blocks that a connector brought for a waiting request."""

    first: int
    """The block of the sequence that the first of them is."""
    blocks: list[Any]
    """Host tensors."""


Key = tuple[float, int]
"""Sorts requests best first: (the policy's rank, order of arrival)."""


class Sequence:
    """One request from `Scheduler.add` to its end.

    While it has a row, the batch holds its tokens and `token_ids` is stale; without one, `token_ids` ([n]
    int32) is prompt and output so far.
    """

    __slots__ = (
        "arrival",
        "done",
        "drafter",
        "fetched",
        "hashes",
        "in_flight",
        "key",
        "limit",
        "num_cached",
        "num_prompt",
        "preempted",
        "prompt_logprobs",
        "queued",
        "request",
        "row",
        "seed",
        "started",
        "status",
        "stop_tokens",
        "swapped",
        "token_ids",
    )

    def __init__(
        self,
        request: Request,
        token_ids: IntArray,
        *,
        key: Key,
        seed: int,
        arrival: float,
        max_model_len: int,
        hashes: BlockHashes,
        drafter: Drafter | None = None,
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.token_ids = token_ids
        self.key = key
        self.seed = seed
        self.arrival = arrival
        self.hashes = hashes
        self.drafter = drafter
        """What proposes its next tokens; None if it does not speculate."""
        self.num_prompt = len(token_ids)
        room = max_model_len - self.num_prompt
        self.limit = self.num_prompt + (room if sampling.max_tokens is None else min(sampling.max_tokens, room))
        """Tokens, prompt and output, at which the request ends for its length."""
        self.stop_tokens = frozenset(self.eos_token_ids) | frozenset(sampling.stop_token_ids)
        self.row = -1
        self.status = Status.WAITING
        self.fetched: Fetched | None = None
        """What a connector brought since the request last had a row."""
        self.in_flight = 0
        """Tokens sampled before a preemption that the host has not seen yet."""
        self.preempted = False
        self.swapped: Swapped | None = None
        """Its KV on the host, while it waits after a preemption by swap."""
        self.started = False
        """Whether the first delta is out."""
        self.done = False
        self.num_cached = 0
        self.queued = 0.0
        top = sampling.prompt_logprobs
        self.prompt_logprobs = None if top is None else PromptScores(self.num_prompt, top)
        """Gathered over the prompt's chunks; None when not asked for or already sent."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return () if self.request.sampling.ignore_eos else self.request.eos_token_ids

    @property
    def may_use_cache(self) -> bool:
        """A prompt whose log-probabilities are still owed must be computed in full."""
        return self.prompt_logprobs is None

    def admission(self, row: int) -> Admission:
        return Admission(
            row=row,
            token_ids=self.token_ids,
            num_prompt_tokens=self.num_prompt,
            sampling=self.request.sampling,
            seed=self.seed,
            eos_token_ids=self.eos_token_ids,
        )

    def append(self, tokens: list[int]) -> None:
        """Add sampled tokens that arrive while the sequence has no row."""
        self.token_ids = np.append(self.token_ids, np.array(tokens, np.int32))

    def until_stop(self, tokens: list[int]) -> tuple[list[int], bool]:
        """`tokens` up to the first stop token, and whether there was one."""
        for i, token in enumerate(tokens):
            if token in self.stop_tokens:
                return tokens[: i + 1], True
        return tokens, False
