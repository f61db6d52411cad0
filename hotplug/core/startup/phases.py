"""How long the phases of a start took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Phases:
    """Seconds by phase, in the order in which they ran."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._begin = clock()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The phase `name`, for as long as the context lasts."""
        begin = self._clock()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - begin

    def report(self) -> dict[str, float]:
        """Seconds by phase, and in total since the first could begin."""
        found = {**self._seconds, "total": self._clock() - self._begin}
        return {name: round(seconds, 3) for name, seconds in found.items()}
