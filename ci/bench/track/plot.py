"""The geometry of a chart: a series as SVG path data.

Across, a unit is a commit: position p is at x = p. Down, 0 is the top and `HEIGHT` the bottom, whatever the figure's
range is. The page stretches this box to the width it has, so that nothing here knows pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from track.series import Change, Commit, Interval, Peer, Point, Series
from track.units import MINUS, SPACE, percent, quantity

HEIGHT = 1000
NEAR = 2.0
"""A peer is drawn where it is within this factor of the figure's range; one further away would flatten the figure."""
SPREAD = 0.04
"""The least share of the figure that the height spans: noise of a thousandth is not drawn as mountains."""
LABELS = 5
NAME = HEIGHT // 10
"""Height of a peer's name."""
LANE = 0.07
"""Share of the width that the number of a change point takes."""


@dataclass(frozen=True)
class Tick:
    """A labelled place of an axis; `at` is in the chart's units."""

    at: int
    label: str
    detail: str = ""


@dataclass(frozen=True)
class PeerLine:
    """A peer's level. Its name stands at `name_at`, which is lower where names would cover each other."""

    at: int
    name_at: int
    label: str


@dataclass(frozen=True)
class Flag:
    """The number of a change point, above the chart; those too near to each other are in lanes of their own."""

    number: int
    change: Change
    lane: int


@dataclass(frozen=True)
class Chart:
    """One drawing of a series."""

    kind: str
    """"value" or "ratio"."""
    low: float
    high: float
    """The range that the height spans: in the figure's unit, or in percent to the base."""
    line: str
    dots: str
    bars: str
    """An interval each."""
    band: str
    missing: str
    """A dot at the bottom for each commit at which the figure was not measured."""
    ticks: tuple[Tick, ...]
    peers: tuple[PeerLine, ...]
    beyond: tuple[str, ...]
    """Peers that are off the scale, in words."""
    flags: tuple[Flag, ...]

    @property
    def lanes(self) -> int:
        return 1 + max((flag.lane for flag in self.flags), default=-1)


@dataclass(frozen=True)
class Scale:
    """Turns a value into a height."""

    low: float
    high: float

    def y(self, value: float) -> int:
        return round((self.high - value) / (self.high - self.low) * HEIGHT)


def value_chart(series: Series, commits: int) -> Chart:
    """The figure's medians and intervals, with the peers as lines."""
    drawn = [(p.position, p.value) for p in series.measured if p.value is not None]
    peers = [p for p in series.peers if p.value is not None]
    span = _span([i for _, i in drawn] or [p.value for p in peers if p.value is not None])
    near = [p for p in peers if span[0] / NEAR <= _middle(p) <= span[1] * NEAR]
    scale = _padded(min([span[0], *map(_middle, near)]), max([span[1], *map(_middle, near)]))
    lines = []
    for peer in sorted(near, key=_middle, reverse=True):
        at = scale.y(_middle(peer))
        name_at = max(at, (lines[-1].name_at if lines else 0) + NAME)
        lines.append(PeerLine(at, name_at, f"{peer.name} {quantity(_middle(peer), series.unit)}"))
    beyond = tuple(
        f"{p.name} is {'above' if _middle(p) > scale.high else 'below'} the scale" for p in peers if p not in near
    )
    return _chart("value", series, scale, drawn, tuple(lines), beyond, commits)


def ratio_chart(series: Series, commits: int) -> Chart | None:
    """Percent to the base; None where no base was measured beside the figure."""
    drawn = [(p.position, _in_percent(p.ratio)) for p in series.measured if p.ratio is not None]
    if not drawn:
        return None
    low, high = _extent([i for _, i in drawn])
    reach = max(high, -low, 100 * SPREAD / 2)
    scale = _padded(min(low, -reach / 2), max(high, reach / 2))
    return _chart("ratio", series, scale, drawn, (), (), commits)


def _chart(
    kind: str,
    series: Series,
    scale: Scale,
    drawn: list[tuple[int, Interval]],
    peers: tuple[PeerLine, ...],
    beyond: tuple[str, ...],
    commits: int,
) -> Chart:
    runs = list(_unbroken(drawn, series.points))
    return Chart(
        kind=kind,
        low=scale.low,
        high=scale.high,
        line="".join("M" + _pairs((x, scale.y(i.middle)) for x, i in run) for run in runs if len(run) > 1),
        dots="".join(f"M{x} {scale.y(i.middle)}z" for x, i in drawn),
        bars="".join(
            f"M{x} {scale.y(i.low)}V{scale.y(i.high)}" for x, i in drawn if i.low is not None and i.high is not None
        ),
        band="".join(_band(run, scale) for run in runs),
        missing="".join(f"M{p.position} {HEIGHT - HEIGHT // 33}z" for p in series.points if p.value is None),
        ticks=tuple(Tick(scale.y(v), _tick_label(v, step, kind)) for v, step in ticks(scale.low, scale.high)),
        peers=peers,
        beyond=beyond,
        flags=_flags(series.changes, commits),
    )


def _unbroken(drawn: list[tuple[int, Interval]], points: Sequence[Point]) -> Iterable[list[tuple[int, Interval]]]:
    """Stretches of points with no commit between them at which the figure was tried and not measured."""
    gaps = sorted(p.position for p in points if p.value is None)
    run: list[tuple[int, Interval]] = []
    ahead = 0
    for position, value in drawn:
        passed = ahead
        while ahead < len(gaps) and gaps[ahead] < position:
            ahead += 1
        if run and ahead > passed:
            yield run
            run = []
        run.append((position, value))
    if run:
        yield run


def _band(run: list[tuple[int, Interval]], scale: Scale) -> str:
    """The area between the ends of neighbouring intervals."""
    ends = [(x, scale.y(i.high), scale.y(i.low)) for x, i in run if i.low is not None and i.high is not None]
    if len(ends) < 2:
        return ""
    there = _pairs((x, high) for x, high, _ in ends)
    back = _pairs((x, low) for x, _, low in reversed(ends))
    return f"M{there} {back}z"


def _pairs(points: Iterable[tuple[int, int]]) -> str:
    return " ".join(f"{x} {y}" for x, y in points)


# --- ranges and axes ------------------------------------------------------------------------------


def _middle(peer: Peer) -> float:
    assert peer.value is not None
    return peer.value.middle


def _in_percent(value: Interval) -> Interval:
    ends = (None if end is None else 100 * (end - 1) for end in (value.low, value.high))
    return Interval(100 * (value.middle - 1), *ends)


def _extent(values: list[Interval]) -> tuple[float, float]:
    """From the least median to the greatest, and as far again on each side where intervals reach there."""
    middles = [i.middle for i in values]
    low, high = min(middles), max(middles)
    ends = [end for i in values for end in (i.low, i.high) if end is not None]
    reach = (high - low) or max((abs(end - low) for end in ends), default=0.0)
    return max(min([low, *ends]), low - reach), min(max([high, *ends]), high + reach)


def _span(values: list[Interval]) -> tuple[float, float]:
    """The range of a figure, at least `SPREAD` of it wide. Without values, 0 to 1."""
    if not values:
        return 0.0, 1.0
    low, high = _extent(values)
    short = max(SPREAD * abs(high) - (high - low), 0.0) or (1.0 if high == low else 0.0)
    return low - short / 2, high + short / 2


def _padded(low: float, high: float) -> Scale:
    margin = 0.08 * (high - low)
    return Scale(low - margin, high + margin)


def ticks(low: float, high: float) -> list[tuple[float, float]]:
    """Three to seven round values within a range, each with the step between them, which is 1, 2 or 5 times 10^n."""
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * (1 - 1e-9))
    return [(n * step, step) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _tick_label(value: float, step: float, kind: str) -> str:
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    text = f"{abs(value):,.{decimals}f}"
    negative = value < 0 and text.strip("0.,")
    if kind == "value":
        return f"{MINUS if negative else ''}{text}"
    return f"{MINUS if negative else '+' if text.strip('0.,') else ''}{text}{SPACE}%"


def commit_ticks(commits: Sequence[Commit]) -> list[Tick]:
    """At most `LABELS` commits, evenly apart, the first and the last among them."""
    count = min(LABELS, len(commits))
    places = [i * (len(commits) - 1) // max(count - 1, 1) for i in range(count)]
    return [Tick(p, commits[p].id[:7], f"{commits[p].date:%d %b}") for p in places]


def _flags(changes: Sequence[Change], commits: int) -> tuple[Flag, ...]:
    """Each in the first lane whose last flag is far enough to the left."""
    ends: list[float] = []
    flags = []
    for number, change in enumerate(changes, 1):
        left = change.position / max(commits, 1)
        lane = next((n for n, end in enumerate(ends) if end <= left), len(ends))
        ends[lane : lane + 1] = [left + LANE]
        flags.append(Flag(number, change, lane))
    return tuple(flags)


def change_text(change: Change, unit: str) -> str:
    """A change in words: "5.2 % worse (31.40 ms to 33.03 ms)"."""
    verdict = "worse" if change.worse else "better"
    if change.of_ratio:
        levels = f"{percent(change.before - 1)} to {percent(change.after - 1)} against the base"
    else:
        levels = f"{quantity(change.before, unit)} to {quantity(change.after, unit)}"
    return f"{percent(change.share).lstrip('+' + MINUS)} {verdict} ({levels})"
