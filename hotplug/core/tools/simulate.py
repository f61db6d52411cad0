"""The engine's loop in virtual time: what a scheduler makes of a trace, without a device and without waiting.

It drives the very `Scheduler` and `KVManager` that an engine runs, as `EngineCore` and the engine process do: requests
are taken in between steps, and a step is planned and launched while the one before it runs. Only the device is a model:
a function that says how long a planned step takes. So a policy, a budget or a KV pool's size can be judged on a trace
in a moment. What it does not know is what tokens come: outputs have the length that the trace says, so nothing stops
early, and proposals, whose fate depends on tokens, are refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from hotplug.core.errors import ConfigError, QueueFullError, RequestError
from hotplug.core.request import Request, SamplingParams
from hotplug.core.scheduler.plan import StepPlan, StepResult
from hotplug.core.scheduler.scheduler import Scheduler

StepTime = Callable[[StepPlan], float]
"""Seconds that a planned step takes."""
_EPOCH = 1.0
"""What the requests' clock shows when the trace begins: an arrival at 0 would mean that none is known."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of a trace."""

    time: float
    """Seconds since the trace began."""
    prompt: Sequence[int]
    """Token ids. What requests share of them can be shared in the prefix cache."""
    output: int
    """Tokens that it generates."""
    priority: int = 0
    cache_salt: str = ""


@dataclass(slots=True)
class RequestTimes:
    """What became of one request; times in seconds since the trace began."""

    arrival: float
    tokens: int = 0
    """Generated."""
    first_token: float | None = None
    """When its first token was there; None if it was refused."""
    finish: float | None = None
    refusal: str = ""
    """Why it was not taken."""

    @property
    def ttft(self) -> float:
        """Seconds to its first token. Raises ValueError for a request that was refused."""
        if self.first_token is None:
            raise ValueError(f"the request has no token: {self.refusal or 'its trace did not end'}")
        return self.first_token - self.arrival


@dataclass(slots=True)
class Simulation:
    """What a trace came to."""

    requests: list[RequestTimes]
    """In the order of the trace."""
    steps: int
    preemptions: int
    makespan: float
    """Seconds from the trace's begin to the last token."""
    busy: float
    """Seconds that the device ran."""

    @property
    def throughput(self) -> float:
        """Generated tokens a second over the makespan; 0 where nothing was generated."""
        return sum(r.tokens for r in self.requests) / self.makespan if self.makespan else 0.0

    @property
    def mean_ttft(self) -> float:
        """Seconds, over the requests that were taken. Raises ValueError where none was."""
        taken = [r.ttft for r in self.requests if r.first_token is not None]
        if not taken:
            raise ValueError("no request was taken")
        return fmean(taken)


def linear(step: float, *, row: float = 0.0, token: float = 0.0) -> StepTime:
    """A step time of three parts, in seconds: of every step, of each request in it, and of each token of a request
    beyond its first (prompt chunks)."""

    def seconds(plan: StepPlan) -> float:
        rows = len(plan.rows)
        return step + rows * row + (plan.total_tokens - rows) * token

    return seconds


def simulate(
    scheduler: Scheduler,
    step_time: StepTime,
    arrivals: Iterable[Arrival],
    *,
    ahead: int = 1,
    host_time: float = 0.0,
) -> Simulation:
    """Run a trace through a scheduler that nothing has used.

    `ahead`: steps that are in flight while the next is planned: 1 on a device beside the host, 0 where it waits.
    `host_time`: seconds of host work a step, before its launch.
    Raises ConfigError for a scheduler that speculates, ValueError for arrivals out of order.
    """
    if scheduler.config.speculation is not None:
        raise ConfigError("a scheduler that speculates cannot be simulated",
                          why="what becomes of proposals depends on the tokens")  # fmt: skip
    return _Loop(scheduler, step_time, list(arrivals), ahead, host_time).run()


class _Loop:
    """One run. `now` is the host's time; the device is free at `_free`."""

    def __init__(
        self, scheduler: Scheduler, step_time: StepTime, trace: list[Arrival], ahead: int, host_time: float
    ) -> None:
        times = [a.time for a in trace]
        if times != sorted(times):
            raise ValueError("the arrivals of a trace are in the order of their times")
        self._scheduler = scheduler
        self._step_time = step_time
        self._trace = trace
        self._ahead, self._host_time = ahead, host_time
        self._requests = [RequestTimes(time) for time in times]
        self._arrived = 0
        self._in_flight: deque[tuple[StepPlan, float]] = deque()
        self._now = self._free = self._busy = self._end = 0.0

    def run(self) -> Simulation:
        while True:
            self._take_arrivals()
            if not self._scheduler.has_work and not self._in_flight:
                if self._arrived == len(self._trace):
                    break
                self._now = self._trace[self._arrived].time
                continue
            self._step()
        stats = self._scheduler.stats()
        return Simulation(self._requests, stats.steps, stats.preemptions, self._end, self._busy)

    def _step(self) -> None:
        """As `EngineCore.step`: plan and launch one, then take the results of the oldest if enough are in flight."""
        plan = self._scheduler.schedule()
        if plan is not None:
            self._launch(plan)
            if len(self._in_flight) <= self._ahead:
                return
        oldest, done = self._in_flight.popleft()  # a scheduler with work has a plan, or waits for one
        self._now = max(self._now, done)
        for delta in self._scheduler.update(oldest, StepResult(np.zeros(len(oldest.rows), np.int32))):
            request = self._requests[int(delta.request_id)]
            if request.first_token is None:
                request.first_token = self._now
            request.tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                request.finish = self._end = self._now

    def _launch(self, plan: StepPlan) -> None:
        self._now += self._host_time
        seconds = self._step_time(plan)
        self._busy += seconds
        self._free = max(self._now, self._free) + seconds
        self._in_flight.append((plan, self._free))

    def _take_arrivals(self) -> None:
        """Give the scheduler what has come by now."""
        while self._arrived < len(self._trace) and self._trace[self._arrived].time <= self._now:
            number, arrival = self._arrived, self._trace[self._arrived]
            self._arrived += 1
            sampling = SamplingParams(temperature=0.0, max_tokens=arrival.output, ignore_eos=True)
            request = Request(
                id=str(number),
                prompt_token_ids=list(arrival.prompt),
                sampling=sampling,
                priority=arrival.priority,
                cache_salt=arrival.cache_salt,
                arrival=_EPOCH + arrival.time,
            )
            try:
                self._scheduler.add(request)
            except (RequestError, QueueFullError) as e:
                self._requests[number].refusal = str(e)
