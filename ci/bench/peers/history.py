"""The rows of a comparison as records of the performance history, whose page draws the peers as lines.

hotplug's first row of a figure, at its defaults and in its first format, is the commit's; all others of a processor's
comparison are lines beside it. On a GPU "weights" is the model, and stands in the figure's name. These names are the
history's own: what the suite calls `start` is measured in another way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from track.records import Record
from track.store import History
from track.trees import find_commit

from peers.records import ROOT, Row

CHANGED = "+"
"""Ends the commit of rows measured while the work tree differed from it: such rows belong to no commit."""


def keep(rows: Iterable[Row], path: Path, root: Path = ROOT) -> int:
    """Add rows to a history file; returns how many were not there before."""
    with contextlib.closing(History(path)) as history:
        return history.add(records(rows, root))


def records(rows: Iterable[Row], root: Path = ROOT) -> list[Record]:
    """Records of these rows. Raises TreeError for a commit that is not in `root`."""
    found = []
    ours: dict[str, tuple[str, str]] = {}
    for row in rows:
        on_gpu = bool(row["machine_facts"].get("gpus"))
        figure = f"compared: {row['weights']} {row['figure']}" if on_gpu else f"compared: {row['figure']}"
        line = row["setting"] if on_gpu else f"{row['weights']}, {row['setting']}"
        of_commit = row["engine"] == "hotplug" and ours.setdefault(figure, (row["weights"], row["setting"])) == (
            row["weights"], row["setting"])  # fmt: skip
        name = f"{row['engine']} {line}"
        common = {
            "run": row["run"], "machine": row["machine"], "machine_facts": row["machine_facts"],
            "at": datetime.fromisoformat(row["at"]), "figure": figure, "unit": row["unit"], "better": row["better"],
            "samples": tuple(row["samples"]), "not_measured": row["not_measured"],
        }  # fmt: skip
        if not of_commit:
            found.append(
                Record(**common, peer=name, versions={name: row["versions"].get("about", ""), **row["versions"]})
            )
        elif row["commit"] is not None and not row["commit"].endswith(CHANGED):
            commit = find_commit(root, row["commit"])
            found.append(Record(**common, versions=row["versions"], plan_hash=row["plan_hash"], commit=commit.id,
                                commit_date=commit.date, subject=commit.subject, parent=commit.parent))  # fmt: skip
    return found
