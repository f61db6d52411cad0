"""Histories for tests of the performance page, made of a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
from track.records import Against, Record

START = datetime(2026, 11, 1, tzinfo=UTC)
SLOWER = 1.08
"""How much slower `long_history` is from its middle commit on."""


def record(
    number: int | None,
    samples: Sequence[float],
    /,
    *,
    base: Sequence[float] | None = None,
    base_of: str = "base",
    at: int = 0,
    **fields: object,
) -> Record:
    """A record of commit `number`, a child of the one before it, or of a peer where it is None."""
    about = (
        {}
        if number is None
        else {
            "commit": f"c{number}",
            "commit_date": START + timedelta(hours=number),
            "subject": f"Change {number}",
            "parent": f"c{number - 1}",
        }
    )
    given = {
        "run": f"run{number}-{at}",
        "machine": "one",
        "machine_facts": {"cpu": "A processor", "cores": 2},
        "versions": {"python": "3.11.7"},
        "at": START + timedelta(days=30, minutes=at),
        "figure": "cpu-one",
        "unit": "tok/s",
        "better": "higher",
        "samples": tuple(samples),
        "against": None if base is None else Against(commit=base_of, samples=tuple(base)),
    }
    made = Record(**(about | given | fields))
    made.check()
    return made


def no_change(values: list[float]) -> list[int]:
    """A detector that finds nothing."""
    return []


def middle(values: list[float]) -> list[int]:
    """A detector that finds a change in the middle of more than ten values that differ there by 5 %."""
    half = len(values) // 2
    return [half] if half > 5 and abs(np.median(values[half:]) / np.median(values[:half]) - 1) > 0.05 else []


def long_history(commits: int, figures: int, samples: int = 12) -> list[Record]:
    """Times with noise, each measured beside its parent; every third figure is slower from the middle on."""
    generator = np.random.default_rng(0)
    made = []
    for number in range(commits):
        for figure in range(figures):
            slower = SLOWER if figure % 3 == 0 and number >= commits // 2 else 1
            noise = generator.lognormal(0, 0.01, (2, samples))
            times, base = (3.3 * (1 + figure) * slower * noise).tolist()
            told = {"figure": f"loop-{figure}", "unit": "ms/step", "better": "lower", "at": number}
            made.append(record(number, times, base=base, base_of=f"c{number - 1}", **told))
    return made
