"""Where the time of a step goes on the host: a lap a phase, kept as sums, and as spans where somebody records them.

Hot path: a lap takes some 0.2 us, a step some 2 us of the engine's loop (`tests/test_step_timing.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from time import perf_counter_ns
from typing import Protocol

PHASES = ("plan", "prepare", "launch", "wait", "update", "send")
"""What the scheduler decides; the device's inputs; starting the model and the sampler; waiting for the tokens of the
oldest step in flight; the scheduler's books; handing the results over."""
PLAN, PREPARE, LAUNCH, WAIT, UPDATE, SEND = range(len(PHASES))

STEP_SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
)  # fmt: skip
"""Upper bounds of the histogram of whole steps."""
_BOUNDS = [round(1e9 * seconds) for seconds in STEP_SECONDS]


class StepRecorder(Protocol):
    """Told of every lap, on the clock of `time.perf_counter_ns`; must return at once."""

    def lap(self, phase: int, begin: int, end: int) -> None: ...

    def launched(self, requests: int, tokens: int) -> None:
        """The step that is about to be launched. Its lap of `LAUNCH` comes next, its lap of `WAIT` in this order."""

    def step(self, begin: int, end: int) -> None:
        """A step of the loop, from its plan until its results were handed over."""


class StepTimer:
    """The phases of one engine's steps. A lap begins where the one before it ended, so that none overlap.

    The loop calls `begin`, then `lap` at the end of each phase, and `sent` when the results are out of its hands.
    """

    __slots__ = ("_begin", "_mark", "buckets", "nanoseconds", "recorder")

    def __init__(self) -> None:
        self.nanoseconds = [0] * len(PHASES)
        """By phase, since start."""
        self.buckets = [0] * (len(_BOUNDS) + 1)
        """Steps by duration: up to each of `STEP_SECONDS`, and longer."""
        self.recorder: StepRecorder | None = None
        self._begin = self._mark = perf_counter_ns()

    def begin(self) -> None:
        """A step begins here: what came before belongs to no phase."""
        self._begin = self._mark = perf_counter_ns()

    def lap(self, phase: int) -> None:
        """All time since the last mark was `phase`."""
        now = perf_counter_ns()
        self.nanoseconds[phase] += now - self._mark
        if self.recorder is not None:
            self.recorder.lap(phase, self._mark, now)
        self._mark = now

    def sent(self) -> None:
        """The step's results are handed over, which ends it."""
        self.lap(SEND)
        self.buckets[bisect_left(_BOUNDS, self._mark - self._begin)] += 1
        if self.recorder is not None:
            self.recorder.step(self._begin, self._mark)
