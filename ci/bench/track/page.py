"""The performance page: series and kernels' records in, one HTML file out.

The file stands alone: style and script are inside, nothing is fetched (its policy forbids it), and without the script
it still shows every chart and table. The script reads charts and tables as they stand, so that each number is in the
file once. Text of commits, machines and peers is escaped by the template.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from track import plot
from track.kernel_history import History, Step
from track.series import Commit, Interval, Machine, Point, Series
from track.units import SPACE, number, percent, quantity

TEMPLATES = Path(__file__).with_name("page")
SHORT = 7
"""Characters of a commit's id that are shown."""
DASH = "\N{EN DASH}"
ABSENT = "\N{EM DASH}"


def render(
    machines: Sequence[Machine], kernels: Sequence[History], made: datetime, titles: Mapping[str, str] | None = None
) -> str:
    """The page. `made` is when, for its foot; `titles` say what a figure is, by its name."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"day": _day, "short": short, "percent": percent}
    views = [MachineView(m, n, titles or {}) for n, m in enumerate(machines)]
    return environment.get_template("page.html").render(
        machines=views,
        titles=[view.title for view in views],
        kernels=[KernelView(h) for h in kernels],
        made=made,
        height=plot.HEIGHT,
        absent=ABSENT,
    )


def short(commit: str | None) -> str:
    """The id as a reader says it; the working tree has none."""
    return (commit or "work tree")[: SHORT if commit else None]


def _day(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment:%d %b %Y}"


# --- figures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MachineView:
    """A machine class as the template reads it."""

    machine: Machine
    number: int
    titles: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The first facts that are short, which say what a reader would call the machine."""
        told = []
        for name, value in self.machine.facts.items():
            text = _fact(name, value)
            if isinstance(value, str) and 0 < len(text) <= 80:
                told.append(text)
            elif isinstance(value, int | float):
                told.append(f"{_fact_name(name)} {text}")
        return ", ".join(told[:3]) or self.machine.id

    @property
    def facts(self) -> list[tuple[str, str]]:
        return [(_fact_name(name), _fact(name, value)) for name, value in self.machine.facts.items()]

    @property
    def figures(self) -> list[FigureView]:
        return [
            FigureView(s, self.machine.commits, f"m{self.number}f{n}", self.titles.get(s.figure, ""))
            for n, s in enumerate(self.machine.series)
        ]

    @property
    def commits(self) -> list[tuple[int, Commit]]:
        """The newest first, each with its position."""
        return list(enumerate(self.machine.commits))[::-1]

    @property
    def span(self) -> str:
        """The first and the last day, in words."""
        days = sorted(commit.date for commit in self.machine.commits)
        ends = dict.fromkeys(_day(day) for day in (days[:1] + days[-1:]))
        return " to ".join(ends)

    @property
    def labels(self) -> list[plot.Tick]:
        return plot.commit_ticks(self.machine.commits)


def _fact_name(name: str) -> str:
    return name.removesuffix("_gib").replace("_", " ")


def _fact(name: str, value: Any) -> str:
    """A fact in words; the names of amounts of memory end with their unit."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    unit = f"{SPACE}GiB" if name.endswith("_gib") else ""
    return f"{value}{unit}"


@dataclass(frozen=True)
class FigureView:
    """A figure as the template reads it."""

    series: Series
    commits: tuple[Commit, ...]
    id: str
    title: str = ""
    """What is measured, in words."""

    @property
    def charts(self) -> list[plot.Chart]:
        charts = [plot.value_chart(self.series, len(self.commits)), plot.ratio_chart(self.series, len(self.commits))]
        return [c for c in charts if c is not None]

    @property
    def last(self) -> Point | None:
        return self.series.measured[-1] if self.series.measured else None

    @property
    def latest(self) -> str:
        return ABSENT if self.last is None else quantity(self.last.value.middle, self.series.unit)

    @property
    def latest_commit(self) -> str:
        return "" if self.last is None else short(self.commits[self.last.position].id)

    @property
    def stale(self) -> bool:
        """The newest commit has no figure."""
        return self.last is None or self.last.position < len(self.commits) - 1

    @property
    def to_base(self) -> str:
        """The latest ratio in words."""
        if self.last is None or self.last.ratio is None:
            return ""
        ends = _interval(self.last.ratio, lambda v: percent(v - 1))
        return f"{percent(self.last.ratio.middle - 1)} to {short(self.last.base)}" + (f" ({ends})" if ends else "")

    @property
    def changes(self) -> list[tuple[int, Commit, str, bool]]:
        """Number, commit, words and whether it is worse, oldest first."""
        unit = self.series.unit
        return [
            (n, self.commits[c.position], plot.change_text(c, unit), c.worse)
            for n, c in enumerate(self.series.changes, 1)
        ]

    @property
    def peers(self) -> list[tuple[str, str, str]]:
        """Name with version, figure, and how hotplug's latest stands to it, the best first."""
        lower = self.series.better == "lower"
        measured = sorted((p for p in self.series.peers if p.value), key=lambda p: p.value.middle, reverse=not lower)
        rows = []
        for peer in [*measured, *(p for p in self.series.peers if not p.value)]:
            name = f"{peer.name} {peer.version}".strip()
            if peer.value is None:
                rows.append((name, f"not measured: {peer.not_measured}", ""))
                continue
            stands = "" if self.last is None else _lead(self.last.value.middle, peer.value.middle, lower)
            rows.append((name, quantity(peer.value.middle, self.series.unit), stands))
        return rows

    @property
    def rows(self) -> list[Row]:
        """The table, newest first."""
        return [Row(point, self.commits[point.position]) for point in reversed(self.series.points)]

    @property
    def summary(self) -> str:
        """What a screen reader says of the chart."""
        measured, changes = len(self.series.measured), len(self.series.changes)
        told = [f"{self.series.figure} at {measured} commit{'s' * (measured != 1)}", f"latest {self.latest}"]
        return ", ".join([*told, f"{changes} change point{'s' * (changes != 1)}"])


def _lead(own: float, peer: float, lower: bool) -> str:
    """1.31x: how much better hotplug is; below 1 it is worse."""
    if own <= 0 or peer <= 0:
        return ""
    return f"{(peer / own if lower else own / peer):.2f}x"


@dataclass(frozen=True)
class Row:
    """A point in words."""

    point: Point
    commit: Commit

    @property
    def value(self) -> str:
        return number(self.point.value.middle)

    @property
    def interval(self) -> str:
        return _interval(self.point.value, number)

    @property
    def ratio(self) -> str:
        return "" if self.point.ratio is None else percent(self.point.ratio.middle - 1)

    @property
    def ratio_interval(self) -> str:
        return "" if self.point.ratio is None else _interval(self.point.ratio, lambda v: percent(v - 1))


def _interval(value: Interval, words: Callable[[float], str]) -> str:
    if value.low is None or value.high is None:
        return ""
    return f"{words(value.low)} {DASH} {words(value.high)}"


# --- kernels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelView:
    """The record of one version of Triton as the template reads it."""

    history: History

    @property
    def rows(self) -> list[tuple[str, str, list[CellView | None]]]:
        """Kernel, specialization and a cell for each target."""
        places = dict.fromkeys((kernel, special) for kernel, special, _ in self.history.steps)
        return [
            (kernel, special, [self._cell(kernel, special, target) for target in self.history.targets])
            for kernel, special in places
        ]

    def _cell(self, kernel: str, special: str, target: str) -> CellView | None:
        steps = self.history.steps.get((kernel, special, target))
        return CellView(steps) if steps else None

    @property
    def totals(self) -> list[tuple[str, int, int, int, int]]:
        """For each target: programs, the most registers, programs that spill, registers spilled in all."""
        rows = []
        for target in self.history.targets:
            steps = [s for (_, _, t), s in self.history.latest.items() if t == target]
            spills = [s.spilled for s in steps if s.spilled]
            rows.append((target, len(steps), max(s.registers for s in steps), len(spills), sum(spills)))
        return rows

    @property
    def over_commits(self) -> list[tuple[Any, list[str]]]:
        """For each commit that changed the record, newest first: its origin, and what each target spills in words."""
        rows = []
        for snapshot in reversed(self.history.snapshots):
            steps = {place: Step(snapshot.origin, figures) for place, figures in snapshot.cells().items()}
            rows.append((snapshot.origin, [_spills(steps, target) for target in self.history.targets]))
        return rows

    @property
    def changed(self) -> list[tuple[str, str, str, list[tuple[Any, str]]]]:
        """Kernel, specialization, target, and each step in words, where a commit changed registers or spills."""
        rows = []
        for (kernel, special, target), steps in self.history.steps.items():
            words = [(step.origin, _taken(step)) for step in steps]
            kept = [w for n, w in enumerate(words) if n == 0 or words[n - 1][1] != w[1]]
            if len(kept) > 1:
                rows.append((kernel, special, target, kept))
        return rows


def _spills(steps: dict[Any, Step], target: str) -> str:
    own = [s for (_, _, t), s in steps.items() if t == target]
    if not own:
        return ABSENT
    spilling = [s.spilled for s in own if s.spilled]
    registers = sum(s.registers for s in own) / len(own)
    return f"{registers:.0f} a program" + (f", {sum(spilling)} spilled in {len(spilling)}" if spilling else "")


def _taken(step: Step) -> str:
    scalars = step.figures.get("sgprs")
    registers = str(step.registers) if scalars is None else f"{step.registers}{SPACE}+{SPACE}{scalars}"
    return registers + (f", {step.spilled}{SPACE}spilled" if step.spilled else "")


@dataclass(frozen=True)
class CellView:
    """What a kernel takes on a target, and whether that changed."""

    steps: tuple[Step, ...]

    @property
    def text(self) -> str:
        return _taken(self.steps[-1])

    @property
    def spills(self) -> bool:
        return self.steps[-1].spilled > 0

    @property
    def before(self) -> str:
        """What it took before the last step, where that was something else."""
        if len(self.steps) < 2 or _taken(self.steps[-2]) == self.text:
            return ""
        return f"was {_taken(self.steps[-2])}"
