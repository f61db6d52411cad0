"""What moved: within a run from paired samples, over the history from change points.

Within a run. A figure's *effect* is the log of head over base. Samples are paired, two pairs to a quad (base, head,
head, base), so a machine that slows down for a second slows both. The effect is the trimmed mean over quads, with a
bootstrap interval. Its *noise floor* is what the same number is between two trees of one commit: their processes
differ in memory layout and timing, which no number of samples in one pair of processes averages out. So the
threshold follows from runs of one commit against itself (`Floor`), and whatever passes it is measured again in fresh
processes: a figure moved if both rounds pass the threshold in the same direction.

Over the history. Segments by PELT (Killick, Fearnhead, Eckley 2012; `ruptures`), kept if a permutation test allows it:
one stretch's level explains more than in permutations of the series.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import ruptures
from scipy import optimize, stats

from track.records import Record

FALSE_POSITIVES = 0.01
"""Of a run: the chance that any of its figures is said to have moved when nothing did."""
TRIM = 0.2
CONFIDENCE = 0.99
RESAMPLES = 2000
PERMUTATIONS, BATCH = 3999, 93  # the one a multiple of the other
LEAST_SEGMENT = 2
LEAST_RUNS = 5
"""Of one commit against itself, below which there is no noise floor."""

Verdict = Literal["same", "worse", "better", "not judged", "not measured"]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """The log of head over base, with the ends of its bootstrap interval and the deviation of its bootstrap."""

    log: float
    low: float
    high: float
    deviation: float

    @property
    def ratio(self) -> float:
        return math.exp(self.log)


def effect(head: Sequence[float], base: Sequence[float]) -> Effect:
    """Of paired samples, positive, two pairs a quad. Raises ValueError where there is no pair."""
    pairs = np.log(np.asarray(head, dtype=float)) - np.log(np.asarray(base, dtype=float))
    if not len(pairs):
        raise ValueError("an effect needs samples")
    quads = pairs.reshape(-1, 2).mean(axis=1) if len(pairs) % 2 == 0 else pairs
    middle = float(stats.trim_mean(quads, TRIM))
    if len(quads) < 2 or np.ptp(quads) == 0:
        return Effect(middle, middle, middle, 0.0)
    drawn = stats.bootstrap((quads,), _trimmed, n_resamples=RESAMPLES, confidence_level=CONFIDENCE,
                            method="percentile", rng=np.random.default_rng(0))  # fmt: skip
    interval = drawn.confidence_interval
    return Effect(middle, float(interval.low), float(interval.high), float(drawn.standard_error))


def _trimmed(values: Floats, axis: int = -1) -> Floats:
    return stats.trim_mean(values, TRIM, axis=axis)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Floor:
    """The noise floor of a figure: how far the effect is from 0 between two trees of one commit."""

    deviation: float
    """Root mean square of the effects."""
    runs: int


def floors(history: Iterable[Record], machine: str, samples: Mapping[str, int]) -> dict[str, Floor]:
    """Of each figure, from the runs of a commit against itself on this machine class.

    `samples` are those that a figure has in the round to be judged: runs with more of them scatter less and are left
    out.
    """
    effects: dict[str, list[float]] = {}
    for record in history:
        if record.machine != machine or record.against is None or record.against.commit != record.commit:
            continue
        if len(record.samples) <= samples.get(record.figure, 0):
            effects.setdefault(record.figure, []).append(effect(record.samples, record.against.samples).log)
    return {
        name: Floor(math.sqrt(sum(e * e for e in found) / len(found)), len(found))
        for name, found in effects.items()
        if len(found) >= LEAST_RUNS
    }


@functools.cache
def threshold(runs: int, figures: int, rate: float = FALSE_POSITIVES) -> float:
    """How many deviations of its floor an effect must have, in both rounds, for it to count.

    Effects of one commit are taken as normal around 0, and the floor's deviation as estimated from `runs` of them. The
    rounds are independent, and a move in either direction counts. `rate` is for all `figures` together.
    """
    return float(optimize.brentq(lambda k: figures * _both_rounds(k, runs) - rate, 0.0, 100.0))


def _both_rounds(k: float, runs: int) -> float:
    """The chance that an effect of nothing has `k` estimated deviations in both rounds, on the same side."""
    share = (np.arange(2000) + 0.5) / 2000
    estimated = np.sqrt(stats.chi2.ppf(share, runs) / runs)  # over the true deviation
    return float(np.mean(2 * stats.norm.sf(k * estimated) ** 2))


@dataclass(frozen=True)
class Finding:
    """What is said of a figure."""

    verdict: Verdict
    effect: Effect | None = None
    """Over both rounds where there were two."""
    least: float | None = None
    """The effect that it takes, as a log."""
    certainty: float | None = None
    """1 less the chance that any figure of such a run moves so far in both rounds when nothing changed."""


def least_effect(one: Effect, floor: Floor, figures: int) -> float:
    """The threshold of a round: of the floor, or of the round's own scatter where that is larger."""
    return threshold(floor.runs, figures) * max(floor.deviation, one.deviation)


def passes(one: Effect, floor: Floor, figures: int) -> bool:
    """Whether a round's effect is beyond its threshold, with an interval that leaves out 0."""
    return abs(one.log) > least_effect(one, floor, figures) and (one.low > 0 or one.high < 0)


def judge(rounds: Sequence[Effect], pooled: Effect, better: str, floor: Floor | None, figures: int) -> Finding:
    """The verdict on a figure from one round, or from two where the first passed."""
    if floor is None:
        return Finding("not judged", pooled)
    least = max(least_effect(one, floor, figures) for one in rounds)
    sides = {one.log > 0 for one in rounds}
    if len(rounds) < 2 or len(sides) > 1 or not all(passes(one, floor, figures) for one in rounds):
        return Finding("same", pooled, least)
    weakest = min(abs(one.log) / max(floor.deviation, one.deviation, 1e-12) for one in rounds)
    certainty = 1 - min(1.0, figures * _both_rounds(weakest, floor.runs))
    higher = sides == {True}
    return Finding("better" if higher == (better == "higher") else "worse", pooled, least, certainty)


def change_points(values: list[float], rate: float = FALSE_POSITIVES / 22) -> list[int]:
    """Indices at which a new level of positive values begins, ascending; `rate` is a series' false-positive rate.

    The default is the whole suite's rate shared among its figures.
    """
    if len(values) < 2 * LEAST_SEGMENT + 1:
        return []
    series = np.log(np.asarray(values, dtype=float))
    noise = float(np.median(np.abs(np.diff(series)))) / 0.6745 / math.sqrt(2)
    penalty = 3 * math.log(len(series)) * max(noise, 1e-9) ** 2
    found = _segments(series, penalty)
    if not found:
        return []
    explained, draw = _explained(series[None])[0], np.random.default_rng(0)
    most = int(rate * (PERMUTATIONS + 1)) - 1
    """Permutations that may do as well."""
    beaten = 0
    for _ in range(0, PERMUTATIONS, BATCH):
        mixed = draw.permuted(np.tile(series, (BATCH, 1)), axis=1)
        beaten += int((_explained(mixed) >= explained).sum())
        if beaten > most:
            return []
    return found


def _segments(series: Floats, penalty: float) -> list[int]:
    fitted = ruptures.KernelCPD(kernel="linear", min_size=LEAST_SEGMENT).fit(series.reshape(-1, 1))
    return [int(end) for end in fitted.predict(pen=penalty)[:-1]]


def _explained(rows: Floats) -> Floats:
    """Of each series in [m, n]: the most of its squares' sum that a level of its own of one stretch explains.

    Stretches are those from the beginning, of any length, and those anywhere whose lengths grow by a quarter.
    """
    n = rows.shape[1]
    sums = np.pad(np.cumsum(rows - rows.mean(axis=1, keepdims=True), axis=1), ((0, 0), (1, 0)))
    ends = np.arange(LEAST_SEGMENT, n - LEAST_SEGMENT + 1)
    best: Floats = (sums[:, ends] ** 2 * (n / (ends * (n - ends)))).max(axis=1)
    length = LEAST_SEGMENT
    while length <= n // 2:
        inside = np.abs(sums[:, length:] - sums[:, :-length]).max(axis=1)
        np.maximum(best, inside**2 * (n / (length * (n - length))), out=best)
        length += max(1, length // 4)
    return best
