"""What a front end knows of its engine without asking: how long it owes an answer, and how much more it may be sent.

The engine answers all it is sent: with tokens, a refusal, the plan, or its statistics, which it also sends while it
steps. So one that says nothing after it was sent something is stopped, hangs, or is in a step that takes that long;
what a front end lets in is bounded here, since a queue inside such an engine bounds nothing.
"""

from __future__ import annotations

import time

from hotplug.core.errors import QueueFullError, RequestError

SILENT = 10.0
"""Seconds without an answer after which an engine does not count as ready."""
SLOW = 1.0
"""Seconds without an answer after which a front end sends no more than its share."""


class Watch:
    """Of one front end among `front_ends` of an engine, whose queue takes `max_queue` requests."""

    def __init__(self, max_queue: int, front_ends: int) -> None:
        self.max_num_seqs = 1
        """Requests that the engine runs at once; it says so when it is ready."""
        self._max_queue = max_queue
        self._front_ends = front_ends
        self._since: float | None = None
        """Since when the engine owes an answer (`time.monotonic`)."""
        self._unheard = 0
        """Requests sent since the engine was last heard. One that was aborted since still waits to be read."""

    def sent(self, requests: int = 0) -> None:
        """The engine is sent something, among it so many requests."""
        self._unheard += requests
        if self._since is None:
            self._since = time.monotonic()

    def heard(self, now: float, *, owes: bool) -> None:
        """The engine has said something; `owes` is whether something that it was sent is not answered in full."""
        self._since = now if owes else None
        self._unheard = 0

    @property
    def silence(self) -> float:
        """Seconds for which the engine has owed an answer and said nothing."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    @property
    def most(self) -> int:
        """Requests that may be in flight: what the engine runs and queues; of a slow one, this front end's share."""
        most = self.max_num_seqs + self._max_queue
        return most if self.silence < SLOW else max(1, most // self._front_ends)

    def check_room(self, in_flight: int, more: int) -> None:
        """Raises QueueFullError where `more` requests beside those `in_flight` are too many, and RequestError where
        they always are."""
        waiting = max(in_flight, self._unheard)
        if waiting + more <= self.most:
            return
        whole = self.max_num_seqs + self._max_queue
        if more > whole:
            raise RequestError(f"n is {more}, and at most {whole} requests run and wait here", param="n",
                               hint="Ask for fewer completions.")  # fmt: skip
        slow = f", and the engine has not answered for {self.silence:.0f} s" if self.silence >= SLOW else ""
        retry_after = 1 + waiting // self.max_num_seqs
        raise QueueFullError(f"{waiting} requests are in flight{slow}", retry_after=retry_after)
