"""The performance history as series: for each machine class, a figure's median and interval over its commits.

Pure: records in, dataclasses out. Nothing here draws or measures.
"""

from __future__ import annotations

import functools
import heapq
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from track.records import Record

RESAMPLES = 1000
"""Bootstrap resamples of an interval: its ends then repeat to about a tenth of the interval's width."""
ENDS = (RESAMPLES * 25 // 1000, RESAMPLES * 975 // 1000 - 1)
"""Of the sorted medians of resamples, those that 2.5 % are below and 2.5 % above."""

ChangePoints = Callable[[list[float]], list[int]]
"""Positive values in the order of commits -> the indices at which a new level begins, ascending."""


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % bootstrap interval; of one sample there is none, and the ends are None."""

    middle: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Commit:
    """A commit that was measured on a machine class."""

    id: str
    date: datetime
    subject: str
    parent: str | None
    versions: tuple[str, ...]
    """What it was measured with, each "name version"; the latest run's."""
    plans: tuple[str, ...]
    """Hashes of the kernel plans that ran."""


@dataclass(frozen=True)
class Point:
    """A figure at a commit. `value` is None where it was not measured, and `not_measured` says why."""

    position: int
    """Of the commit, in `Machine.commits`."""
    value: Interval | None = None
    ratio: Interval | None = None
    """Of the commit to its base, sample by sample; None where no base was measured beside it."""
    base: str | None = None
    samples: int = 0
    runs: int = 0
    not_measured: str | None = None


@dataclass(frozen=True)
class Change:
    """A level of a figure that begins at a commit."""

    position: int
    before: float
    after: float
    """Medians of the commits' medians, from the change point before it, and up to the next one."""
    of_ratio: bool
    """Found in ratios to one base, which `before` and `after` then are; else they are in the figure's unit."""
    worse: bool

    @property
    def share(self) -> float:
        """0.05 where the new level is 5 % higher."""
        return self.after / self.before - 1


@dataclass(frozen=True)
class Peer:
    """A peer's latest figure on the same machine class; `value` is None where it was not measured."""

    name: str
    value: Interval | None
    version: str
    not_measured: str | None


@dataclass(frozen=True)
class Series:
    """One figure on one machine class."""

    figure: str
    unit: str
    better: str
    points: tuple[Point, ...]
    """In the order of commits; a commit without any record of the figure has no point."""
    changes: tuple[Change, ...]
    peers: tuple[Peer, ...]

    @property
    def measured(self) -> tuple[Point, ...]:
        return tuple(p for p in self.points if p.value is not None)


@dataclass(frozen=True)
class Machine:
    """A machine class with all that was measured on it."""

    id: str
    facts: dict[str, Any]
    commits: tuple[Commit, ...]
    """Parents before children, else by date."""
    series: tuple[Series, ...]
    """In the latest run's order; figures that it has not follow."""
    last: datetime = field(compare=False)
    """When its last run began."""


def machines(records: Iterable[Record], change_points: ChangePoints) -> list[Machine]:
    """The machine classes of a history, that of the latest run first.

    Samples of several runs of a commit are pooled; ratios are to the commit that most others were measured beside.
    Change points are looked for in the ratios where every commit has one to the same base, since these leave out what
    a machine's state adds to both; elsewhere in the medians.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.machine, []).append(record)
    found = [_machine(name, group, change_points) for name, group in groups.items()]
    return sorted(found, key=lambda m: m.last, reverse=True)


def _machine(name: str, records: list[Record], change_points: ChangePoints) -> Machine:
    latest = max(records, key=lambda r: r.at)
    commits = _commits(records)
    positions = {commit.id: position for position, commit in enumerate(commits)}
    figures: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.peer is None, r.at), reverse=True):  # stable within a run
        figures.setdefault(record.figure, []).append(record)
    series = tuple(_series(group, positions, change_points) for group in figures.values())
    return Machine(name, latest.machine_facts, commits, series, latest.at)


def _commits(records: list[Record]) -> tuple[Commit, ...]:
    runs: dict[str, list[Record]] = {}
    for record in records:
        if record.commit is not None:
            runs.setdefault(record.commit, []).append(record)
    commits = {}
    for name, group in runs.items():
        last = max(group, key=lambda r: r.at)
        plans = tuple(dict.fromkeys(r.plan_hash for r in group if r.plan_hash is not None))
        versions = tuple(f"{package} {version}" for package, version in last.versions.items())
        assert last.commit_date is not None  # Record.check
        commits[name] = Commit(name, last.commit_date, last.subject, last.parent, versions, plans)
    return tuple(commits[name] for name in _in_order(commits))


def _in_order(commits: dict[str, Commit]) -> list[str]:
    """Ids of commits, parents before children, else by date and then as they came."""
    rank = {name: (commit.date, number) for number, (name, commit) in enumerate(commits.items())}
    children: dict[str, list[str]] = {}
    ready = []
    for name, commit in commits.items():
        if commit.parent in commits and commit.parent != name:
            children.setdefault(commit.parent, []).append(name)
        else:
            heapq.heappush(ready, (rank[name], name))
    order = []
    while ready:
        _, name = heapq.heappop(ready)
        order.append(name)
        for child in children.get(name, ()):
            heapq.heappush(ready, (rank[child], child))
    if len(order) < len(commits):
        raise ValueError(f"commits are each other's parents: {', '.join(sorted(commits.keys() - set(order)))}")
    return order


def _series(records: list[Record], positions: dict[str, int], change_points: ChangePoints) -> Series:
    last = max(records, key=lambda r: r.at)
    by_commit: dict[str, list[Record]] = {}
    by_peer: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: r.at):
        if record.commit is not None:
            by_commit.setdefault(record.commit, []).append(record)
        elif record.peer is not None:
            by_peer[record.peer] = record
    base = _common_base(by_commit)
    points = sorted((_point(positions[c], c, runs, base) for c, runs in by_commit.items()), key=lambda p: p.position)
    peers = tuple(
        Peer(name, interval(r.samples) if r.samples else None, r.versions.get(name, ""), r.not_measured)
        for name, r in by_peer.items()
        if r.unit == last.unit  # or it is not the same figure
    )
    changes = _changes(points, last.better == "lower", change_points)
    return Series(last.figure, last.unit, last.better, tuple(points), changes, peers)


def _common_base(by_commit: dict[str, list[Record]]) -> str | None:
    """The commit that most others were measured beside; of equals the one that was so last."""
    beside = [(r.at, r.against.commit, commit) for commit, runs in by_commit.items() for r in runs
              if r.samples and r.against is not None and r.against.commit != commit]  # fmt: skip
    others: dict[str, set[str]] = {}
    for _, base, commit in sorted(beside, reverse=True):
        others.setdefault(base, set()).add(commit)
    return max(others, key=lambda base: len(others[base]), default=None)


def _point(position: int, commit: str, runs: list[Record], base: str | None) -> Point:
    """The point of a commit's runs, the latest last. Its ratio is to `base`, where one run has it, or else to the base
    of the latest run. That of `base` itself is what it was beside itself, or 1."""
    measured = [r for r in runs if r.samples]
    if not measured:
        return Point(position, runs=len(runs), not_measured=runs[-1].not_measured)
    samples = [s for r in measured for s in r.samples]
    # Else a commit beside itself shows the machine's noise, and is no ratio to a base.
    beside = [(r, r.against) for r in measured
              if r.against is not None and (commit == base or r.against.commit != commit)]  # fmt: skip
    if not any(against.commit == base for _, against in beside) and commit != base:
        base = beside[-1][1].commit if beside else None
    pairs = [
        pair for r, against in beside if against.commit == base for pair in zip(r.samples, against.samples, strict=True)
    ]
    found = ratio(pairs)
    if found is None and commit == base:
        found = Interval(1.0, None, None)
    return Point(position, interval(samples), found, base, len(samples), len(measured))


# --- intervals ------------------------------------------------------------------------------------


def interval(samples: Sequence[float]) -> Interval:
    """The median of samples (at least one) with its 95 % percentile bootstrap interval."""
    values = np.sort(np.asarray(samples, dtype=np.float64))
    count = len(values)
    middle = float(values[(count - 1) // 2] + values[count // 2]) / 2
    if count == 1:
        return Interval(middle, None, None)
    lower, upper = _middles(count)
    medians = np.partition((values[lower] + values[upper]) / 2, ENDS)
    return Interval(middle, *(float(medians[end]) for end in ENDS))


@functools.cache
def _middles(count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each resample of `count` sorted values, the indices of its two middle values: [RESAMPLES] each.

    A resample's order is that of its indices, so that the median needs these two alone. The seed is fixed: the same
    history gives the same page.
    """
    drawn = np.sort(np.random.default_rng(0).integers(0, count, (RESAMPLES, count)), axis=1)
    return drawn[:, (count - 1) // 2], drawn[:, count // 2]


def ratio(pairs: Sequence[tuple[float, float]]) -> Interval | None:
    """The median ratio of (sample, base) pairs with its interval; None without pairs, or where one holds a zero."""
    if not pairs or any(a <= 0 or b <= 0 for a, b in pairs):
        return None
    found = interval([math.log(a / b) for a, b in pairs])
    ends = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return Interval(math.exp(found.middle), *ends)


# --- change points --------------------------------------------------------------------------------


def _changes(points: list[Point], lower_is_better: bool, change_points: ChangePoints) -> tuple[Change, ...]:
    measured = [p for p in points if p.value is not None]
    of_ratio = all(p.ratio is not None for p in measured) and len({p.base for p in measured}) == 1
    values = [(p.ratio if of_ratio else p.value).middle for p in measured]
    if len(values) < 2 or min(values) <= 0:
        return ()
    starts = change_points(values)
    if starts != sorted(set(starts)) or any(not 0 < start < len(values) for start in starts):
        raise ValueError(f"change points must be ascending indices from 1 to {len(values) - 1}, and are {starts}")
    edges = [0, *starts, len(values)]
    changes = []
    for before, start, after in zip(edges, edges[1:], edges[2:], strict=False):
        old, new = statistics.median(values[before:start]), statistics.median(values[start:after])
        worse = (new > old) == lower_is_better
        changes.append(Change(measured[start].position, old, new, of_ratio, worse))
    return tuple(changes)
