"""What a comparison found, as a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from track import detect
from track.compare import Figures
from track.detect import Floor
from track.suite import figures


def of(found: Mapping[str, Figures]) -> str:
    """Each figure's medians, ratio, interval, verdict and its certainty."""
    known = figures()
    rows = [["figure", "unit", "base", "head", "ratio", "99 % interval", "it takes", "verdict", "certainty"]]
    for name, one in found.items():
        if one.not_measured is not None:
            rows.append([name, known[name].unit, "-", "-", "-", "-", "-", "not measured", one.not_measured])
            continue
        effect, finding = one.finding.effect, one.finding
        assert effect is not None
        rows.append([
            name, known[name].unit, f"{median(one.samples.base):.4g}", f"{median(one.samples.head):.4g}",
            f"{effect.ratio:.3f}", f"{math.exp(effect.low):.3f} to {math.exp(effect.high):.3f}",
            "-" if finding.least is None else f"{math.expm1(finding.least):.1%}",
            finding.verdict, "-" if finding.certainty is None else _certainty(finding.certainty),
        ])  # fmt: skip
    return _markdown(rows)


def of_floors(floors: Mapping[str, Floor]) -> str:
    """The noise floor of each figure, and the effect that it takes in both rounds."""
    rows = [["figure", "runs", "deviation", "it takes"]]
    for name, floor in floors.items():
        least = detect.threshold(floor.runs, max(len(floors), 1)) * floor.deviation
        rows.append([name, str(floor.runs), f"{floor.deviation:.2%}", f"{math.expm1(least):.1%}"])
    return _markdown(rows)


def _certainty(value: float) -> str:
    return "> 99.99 %" if value > 0.9999 else f"{value:.2%}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in rows]  # fmt: skip
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
