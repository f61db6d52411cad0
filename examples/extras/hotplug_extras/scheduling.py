"""A scheduling policy: short prompts first, and nobody waits for ever."""

from __future__ import annotations

from hotplug.plugins import Request


class ShortestFirst:
    """A prompt of n tokens is served as if it had come n / `rate` seconds later.

    Short prompts pass long ones that came shortly before; a long one is passed for that time at most.
    """

    preempts = False

    def __init__(self, rate: float = 1000.0) -> None:
        self.rate = rate

    def rank(self, request: Request) -> float:
        return request.arrival + len(request.prompt_token_ids) / self.rate
