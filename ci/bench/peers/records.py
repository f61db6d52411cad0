"""What a comparison keeps: a row a figure of one engine at one setting, with its raw samples, as JSON lines.

A row has "run" (one invocation), "commit" (hotplug's; None of a peer) or "peer" (the engine's name), "engine",
"weights", "setting", "machine" and "machine_facts", "versions", "plan_hash", "at" (ISO 8601), "figure", "unit",
"better" ("higher" or "lower"), "samples", "against" (hotplug at its defaults, measured in turns with it: "commit" and
"samples"; or None), "others" (cores that other processes took in the meantime; None where nobody looked) and
"not_measured" (the reason where there are no samples, or None).
"""

from __future__ import annotations

import json
import platform
import subprocess
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from track import machine

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "ci" / "bench" / "results"
KEYS = (
    "run", "commit", "peer", "engine", "weights", "setting", "machine", "machine_facts", "versions", "plan_hash", "at",
    "figure", "unit", "better", "samples", "against", "others",
    "not_measured",
)  # fmt: skip

Row = dict[str, Any]


class Run:
    """One invocation: what all its rows have in common."""

    def __init__(self, facts: dict[str, Any] | None = None) -> None:
        self.facts = machine.facts() if facts is None else facts
        self._common = {
            "run": uuid.uuid4().hex[:12],
            "machine": machine.machine_class(self.facts),
            "machine_facts": self.facts,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.commit = commit()

    def row(self, *, engine: str, weights: str, setting: str, figure: str, unit: str, better: str,
            samples: Iterable[float] = (), versions: dict[str, str] | None = None, plan_hash: str | None = None,
            against: Iterable[float] | None = None, others: float | None = None,
            not_measured: str | None = None) -> Row:  # fmt: skip
        """A row. Raises ValueError where it has neither samples nor a reason, or both."""
        values = list(samples)
        if bool(values) is (not_measured is not None):
            raise ValueError(f"{engine}, {figure}: {len(values)} samples, and the reason that there are none is "
                             f"{not_measured!r}")  # fmt: skip
        ours = engine == "hotplug"
        made = {
            **self._common,
            "commit": self.commit if ours else None,
            "peer": None if ours else engine,
            "engine": engine,
            "weights": weights,
            "setting": setting,
            "versions": {"python": platform.python_version(), **(versions or {})},
            "plan_hash": plan_hash,
            "figure": figure,
            "unit": unit,
            "better": better,
            "samples": values,
            "against": None if against is None else {"commit": self.commit, "samples": list(against)},
            "others": others,
            "not_measured": not_measured,
        }
        return {key: made[key] for key in KEYS}


def commit() -> str | None:
    """The commit that is checked out, with a plus sign where tracked files differ from it; None outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--"], cwd=ROOT, capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.returncode else "")


def read(path: Path) -> list[Row]:
    """The rows of a file. Raises ValueError where a line lacks a key."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if missing := [key for key in KEYS if key not in row]:
            raise ValueError(f"{path}, row {number}: {', '.join(missing)} missing")
    return rows


def merge(path: Path, rows: list[Row]) -> list[Row]:
    """Write `rows` to a file in place of those of the same engines; the others of the file stay. All rows then."""
    measured = {row["engine"] for row in rows}
    kept = [row for row in read(path) if row["engine"] not in measured] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in (*kept, *rows)))
    return [*kept, *rows]
