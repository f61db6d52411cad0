"""The comparison tables as Markdown, from kept rows alone: the same rows give the same text on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median

from peers.records import Row
from peers.settings import DEFAULTS, NOT_RUN, engines

Key = tuple[str, str, str]
"""Engine, weights (of a GPU's table: the model), setting."""
ROOFLINE = "roofline"
"""The "engine" of rows that say what the device's ceilings allow."""


@dataclass(frozen=True)
class Column:
    """A figure in the CPU's table."""

    figure: str
    title: str
    per: float = 1.0
    """What the row's unit is divided by."""


CPU_COLUMNS = (
    Column("w1-first", "W1 first token, ms"), Column("w1-decode", "W1 tok/s"), Column("w2-out", "W2 out tok/s"),
    Column("w3-out", "W3 out tok/s"), Column("w4-prompt", "W4 in tok/s"), Column("start", "start, s"),
    Column("rss", "peak RSS, GB", 1e9 / 2**20),
)  # fmt: skip


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is the heading."""
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in ruled)


def number(value: float | None) -> str:
    """Three digits that count, with commas in thousands; a dash for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


DISTURBED = 0.25
"""Cores taken by others from which on a row is marked: an engine whose threads wait for each other loses most by it."""


class Medians:
    """The median of each figure of each engine, weights and setting."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._found: dict[tuple[Key, str], float] = {}
        self._better: dict[str, str] = {}
        self._units: dict[str, str] = {}
        self.keys: list[Key] = []
        """In the rows' order."""
        self.disturbed: set[Key] = set()
        """Those that were measured while others took cores."""
        self.figures: list[str] = []
        for row in rows:
            key, figure = (row["engine"], row["weights"], row["setting"]), row["figure"]
            if key not in self.keys:
                self.keys.append(key)
            if figure not in self.figures:
                self.figures.append(figure)
            if (row["others"] or 0.0) > DISTURBED:
                self.disturbed.add(key)
            self._better[figure], self._units[figure] = row["better"], row["unit"]
            if row["samples"]:
                self._found[key, figure] = median(row["samples"])

    def of(self, key: Key, figure: str) -> float | None:
        return self._found.get((key, figure))

    def title(self, key: Key) -> list[str]:
        """The cells that say which row it is."""
        return [key[0], key[1], key[2] + (" (disturbed)" if key in self.disturbed else "")]

    def measured(self, key: Key) -> bool:
        return any(found == key for found, _ in self._found)

    def unit(self, figure: str) -> str:
        return self._units[figure]

    def best(self, figure: str, wanted: Callable[[Key], bool]) -> float | None:
        values = [value for (key, name), value in self._found.items() if name == figure and wanted(key)]
        if not values:
            return None
        return max(values) if self._better[figure] == "higher" else min(values)

    def lead(self, figure: str, ours: float | None, other: float | None) -> str:
        """How much better `ours` is than `other`: above 1 where it is."""
        if not ours or not other:
            return "-"
        return f"{ours / other if self._better[figure] == 'higher' else other / ours:.2f}x"


def cpu_table(rows: Iterable[Row]) -> str:
    """A line an engine, weights and setting; then the best of the peers."""
    found = Medians(rows)
    columns = [column for column in CPU_COLUMNS if column.figure in found.figures]

    def line(title: list[str], value: Callable[[Column], float | None]) -> list[str]:
        return [*title, *(number(None if (v := value(c)) is None else v / c.per) for c in columns)]

    keys = _in_order(found)
    lines = [["engine", "weights", "setting", *(column.title for column in columns)]]
    lines += [line(found.title(key), lambda column, key=key: found.of(key, column.figure)) for key in keys]
    if any(map(_a_peer, keys)):
        lines.append(line(["best of the peers", "", ""], lambda column: found.best(column.figure, _a_peer)))
    return markdown(lines)


def lead_table(rows: Iterable[Row]) -> str:
    """A line a peer's row: hotplug at its defaults over it, the median over rounds that were run in turns."""
    rows = list(rows)
    found = Medians(rows)
    columns = [column for column in CPU_COLUMNS if column.figure in found.figures]
    ratios = {(row["engine"], row["weights"], row["setting"], row["figure"]): paired(row) for row in rows
              if row["samples"] and row["against"]}  # fmt: skip
    lines = [["hotplug at its defaults over", "", "", *(column.title.rpartition(",")[0] or column.title
                                                        for column in columns)]]  # fmt: skip
    for key in filter(_a_peer, _in_order(found)):
        values = [ratios.get((*key, column.figure)) for column in columns]
        lines.append([*found.title(key), *("-" if value is None else f"{value:.2f}x" for value in values)])
    return markdown(lines)


def paired(row: Row) -> float:
    """How much better hotplug was than the row: the median of the rounds' ratios, above 1 where it was."""
    samples, ours = row["samples"], row["against"]["samples"]
    pairs = zip(samples, ours, strict=True) if len(samples) == len(ours) else [(median(samples), median(ours))]
    return median(own / other if row["better"] == "higher" else other / own for other, own in pairs)


def _in_order(found: Medians) -> list[Key]:
    """The keys that have a figure, by engine."""
    names = [engine.name for engine in engines([0])]
    return sorted(filter(found.measured, found.keys), key=lambda key: names.index(key[0]))


def _a_peer(key: Key) -> bool:
    return key[0] != "hotplug"


def settings_table() -> str:
    """What is set at each setting, and the page that recommends it."""
    lines = [["engine", "setting", "what is set", "recommended by"]]
    lines += [
        [engine.name, setting.name, setting.said, setting.source or "-"]
        for engine in engines([0]) for setting in engine.settings
    ]  # fmt: skip
    return markdown(lines)


def not_run(rows: Iterable[Row]) -> str:
    """What has no figure: rows that failed, and engines that cannot be had, each with its reason."""
    lines = [["not run", "tried", "why"]]
    seen: set[tuple[str, str]] = set()
    for row in rows:
        title = f"{row['engine']} {row['weights']}, {row['setting']}"
        reason = row["not_measured"]
        if reason is not None and (title, reason) not in seen:
            seen.add((title, reason))
            lines.append([title, "measured with the others", reason.replace("|", "\\|")])
    lines += [[absent.name, absent.tried, absent.reason] for absent in NOT_RUN]
    return markdown(lines)


def model_table(rows: Iterable[Row]) -> str:
    """A line a model, workload and setting: hotplug, the peers, the ratios; the roofline where there is one."""
    found = Medians(rows)
    models = list(dict.fromkeys(key[1] for key in found.keys))
    settings = list(dict.fromkeys(key[2] for key in found.keys))
    peers = [name for name in dict.fromkeys(key[0] for key in found.keys) if name not in ("hotplug", ROOFLINE)]
    roofline = any(key[0] == ROOFLINE for key in found.keys)
    several = len(settings) > 1
    lines = [["model", "workload", *(["setting"] if several else []), "hotplug",
              *(part for peer in peers for part in (peer, "ratio")), *(["roofline"] if roofline else [])]]  # fmt: skip
    for model, figure, setting in product(models, found.figures, settings):
        ours = found.of(("hotplug", model, setting), figure)
        others = [found.of((peer, model, setting), figure) for peer in peers]
        if ours is None and not any(others):
            continue
        line = [model, figure, *([setting] if several else []), f"{exact(ours)} {found.unit(figure)}" if ours else "-"]
        for other in others:
            line += [exact(other), found.lead(figure, ours, other)]
        if roofline:
            line.append(exact(found.of((ROOFLINE, model, DEFAULTS), figure)))
        lines.append(line)
    return markdown(lines)


def exact(value: float | None) -> str:
    """As many digits as a GPU's figures are steady to: four, with commas."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}" if abs(value) < 10 else f"{value:.4g}"


LOAD_COLUMNS = ("out tok/s", "first token p50 / p99, ms", "gap p50 / p99, ms")


def load_table(rows: Iterable[Row]) -> str:
    """A line a load and server. Figures are named "LOAD: out tok/s", "LOAD: first token p50", "LOAD: gap p99"."""
    found = Medians(rows)
    loads = list(dict.fromkeys(figure.rpartition(": ")[0] for figure in found.figures))
    lines = [["model", "load", "server", *LOAD_COLUMNS]]
    for load, key in product(loads, found.keys):
        rate = found.of(key, f"{load}: out tok/s")
        if rate is None:
            continue
        pairs = [
            " / ".join(tenths(found.of(key, f"{load}: {name} {share}")) for share in ("p50", "p99"))
            for name in ("first token", "gap")
        ]
        server = key[0] if key[2] == DEFAULTS else f"{key[0]}, {key[2]}"
        lines.append([key[1], load, server, f"{rate:,.0f}", *pairs])
    return markdown(lines)


def tenths(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}"
