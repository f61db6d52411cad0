"""Scheduling policies: which waiting request starts next. What a step may hold is the scheduler's own business."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from hotplug.core.checks import shown
from hotplug.core.errors import RequestError
from hotplug.core.request import Request


class SchedulingPolicy(Protocol):
    """Orders requests. One object serves all requests of an engine; it is asked once a request."""

    @property
    def preempts(self) -> bool:
        """Whether a waiting request takes the place of a running one of worse rank when there is no room."""
        ...

    def rank(self, request: Request) -> float:
        """Lower starts first, equal ranks in order of arrival; a finite number, kept for the request's life.

        `request.arrival` and the present are seconds of `time.monotonic`. A rank that grows with arrival (a
        deadline) cannot starve anybody; one that does not may.
        """
        ...


class FirstComeFirstServed:
    """In order of arrival."""

    preempts = False

    def rank(self, request: Request) -> float:
        return 0.0


class Priority:
    """By `Request.priority`, in order of arrival within one."""

    preempts = True

    def rank(self, request: Request) -> float:
        return request.priority


FCFS: SchedulingPolicy = FirstComeFirstServed()
PRIORITY: SchedulingPolicy = Priority()
POLICIES: Mapping[str, SchedulingPolicy] = MappingProxyType({"fcfs": FCFS, "priority": PRIORITY})


def rank_of(policy: SchedulingPolicy, request: Request) -> float:
    """The request's rank. Raises RequestError where the policy gives what cannot be ordered."""
    try:
        rank = policy.rank(request)
    except Exception as e:
        raise RequestError(f"the scheduling policy {type(policy).__name__} fails on the request: {e!r}") from e
    try:
        found = float(rank) if isinstance(rank, int | float) else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        ranked = shown(rank)
        raise RequestError(f"the scheduling policy {type(policy).__name__} ranks the request {ranked}, not a number")
    return found
