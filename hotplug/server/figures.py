"""Where a server's counts and histograms live: an array with one row a front end, in memory that all of them see.

A front end adds to its own row only, and a scrape sums the rows: whichever front end answers it, the figures are those
of all. The rows outlive the processes, so that one that takes the place of another goes on from where that one ended,
and no counter falls. Cells are aligned float64, which are read and written whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

Cells = npt.NDArray[np.float64]

FINISH_REASONS = ("stop", "length", "abort", "error")

HISTOGRAMS: dict[str, tuple[float, ...]] = {
    "time_to_first_token": (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
    "inter_token_latency": (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
    "queue_time": (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
    "request_duration": (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
}  # fmt: skip
"""Upper bounds in seconds."""


def _layout() -> tuple[dict[str, slice], int]:
    """The cells of each figure in a row, and the width of a row. A histogram: counts by bucket, then the sum."""
    places: dict[str, slice] = {}
    width = 0
    sizes = {name: len(bounds) + 2 for name, bounds in HISTOGRAMS.items()}
    for name, size in {**sizes, "finished": len(FINISH_REASONS), "restarts": 1}.items():
        places[name] = slice(width, width + size)
        width += size
    return places, width


_PLACES, _WIDTH = _layout()


class Figures:
    """The table, and which of its rows is this process's."""

    def __init__(self, table: Cells, row: int = 0) -> None:
        self._table = table
        self._row = table[row]

    @classmethod
    def alone(cls) -> Figures:
        """Of a process that has the server to itself."""
        return cls(np.zeros((1, _WIDTH)))

    @classmethod
    def create(cls, path: Path, rows: int) -> Figures:
        """A table in a new file, for processes that `attach`. The caller's row is the last of `rows`."""
        return cls(np.memmap(path, np.float64, "w+", shape=(rows, _WIDTH)), rows - 1)

    @classmethod
    def attach(cls, path: Path, row: int) -> Figures:
        table = np.memmap(path, np.float64, "r+")
        return cls(table.reshape(-1, _WIDTH), row)

    def own(self, name: str) -> Cells:
        """This process's cells of a figure, to be added to."""
        return np.asarray(self._row[_PLACES[name]])

    def total(self, name: str) -> Sequence[float]:
        """A figure over all processes."""
        return self._table[:, _PLACES[name]].sum(axis=0).tolist()
