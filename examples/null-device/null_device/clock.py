"""The device's time: when what was launched will be done, without anything being done.

A step takes NULL_DEVICE_STEP_MS milliseconds, and NULL_DEVICE_TOKEN_US microseconds more for every token beyond the
first of each request (prompt chunks); both are 0 unless set. Steps run one after the other in the order launched, each
not before its launch, as on a real device's stream.
"""

from __future__ import annotations

import math
import os
import time

from hotplug.vendor import PlatformError

STEP, TOKEN = "NULL_DEVICE_STEP_MS", "NULL_DEVICE_TOKEN_US"
_SPIN = 100e-6
"""Seconds before a deadline at which sleeping ends: the kernel wakes a sleeper some 60 us late."""
now = time.perf_counter


class Clock:
    """One device's time, in seconds of `time.perf_counter`."""

    def __init__(self, step: float = 0.0, token: float = 0.0) -> None:
        """Seconds that a step takes, and each token beyond the first of a request in it."""
        self.step, self.token = step, token
        self.free_at = 0.0
        """When everything launched so far is done."""

    @classmethod
    def from_environment(cls) -> Clock:
        """As the variables say. Raises PlatformError for one that is no time."""
        return cls(_seconds(STEP, 1e-3), _seconds(TOKEN, 1e-6))

    def event(self) -> Event:
        return Event(self)

    def launch(self, more_tokens: int) -> None:
        """A step begins once the device is free, with so many tokens beyond the first of each request."""
        self.free_at = max(now(), self.free_at) + self.step + more_tokens * self.token


class Event:
    """A place in the device's work, reached when all that was launched before `record` is done."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._at = 0.0

    def record(self) -> None:
        self._at = max(now(), self._clock.free_at)

    def query(self) -> bool:
        """Whether it is reached."""
        return now() >= self._at

    def synchronize(self) -> None:
        """Return when it is reached: sleep, and spin for the last moment to be in time."""
        if (left := self._at - now() - _SPIN) > 0:
            time.sleep(left)
        while now() < self._at:
            pass


def _seconds(variable: str, unit: float) -> float:
    text = os.environ.get(variable, "0")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise PlatformError(f"{text!r} is no time", where=variable, hint="Set it to a number of at least 0.")
    return value * unit
