"""Writes ROADMAP.md from docs/features.toml, and reads that table strictly. `make docs`."""

from __future__ import annotations

import dataclasses
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
TABLE = ROOT / "docs" / "features.toml"
PAGE = ROOT / "ROADMAP.md"
STATES = {
    "done": "works; the tests or commands beside it show it",
    "partly": "works within a limit, which is said",
    "planned": "not built; what asks for it is refused by name, or does not exist",
    "refused": "will not be built, and why",
}
NEEDS = {"done": {"shown"}, "partly": {"shown", "note"}, "planned": {"note"}, "refused": {"note"}}
"""Fields that a row of each state must fill."""

HEAD = """# Roadmap

What hotplug does, does within limits, will do, and will not do. Written by `make docs` from `docs/features.toml`; a
test keeps it so, and checks that every test and command named here exists. There are no dates: a row is done when it
is shown. To ask for a feature, or to move one, open an issue with the form "Feature or RFC"; changes of the platform
interface are [RFCs](docs/rfcs/README.md).

"""


class TableError(Exception):
    """A row of the table that is not as its head says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One row of the table; the fields are explained at its head."""

    area: str
    name: str
    state: str
    shown: tuple[str, ...] = ()
    note: str = ""


def read_features(text: str) -> list[Feature]:
    """The rows of a table in TOML, in its order. Raises TableError, which names the row."""
    features = [_feature(row) for row in tomllib.loads(text)["feature"]]
    areas = [area for area, _ in groupby(features, key=lambda feature: feature.area)]
    for found, what in ((areas, "area in two places"), ([f.name for f in features], "feature twice")):
        if twice := sorted({name for name in found if found.count(name) > 1}):
            raise TableError(f"{what}: {', '.join(twice)}")
    return features


def _feature(row: Mapping[str, Any]) -> Feature:
    name = row.get("name", "a row without a name")
    if unknown := sorted(row.keys() - {field.name for field in dataclasses.fields(Feature)}):
        raise TableError(f"{name}: unknown keys {', '.join(unknown)}")
    if missing := sorted({"area", "name", "state"} - row.keys()):
        raise TableError(f"{name}: lacks {', '.join(missing)}")
    if row["state"] not in STATES:
        raise TableError(f"{name}: the state {row['state']!r} is none of {', '.join(STATES)}")
    if empty := sorted(field for field in NEEDS[row["state"]] if not row.get(field)):
        raise TableError(f"{name}: a row that is {row['state']} needs {', '.join(empty)}")
    return Feature(**{**row, "shown": tuple(row.get("shown", ()))})


def page(features: Sequence[Feature]) -> str:
    """The text of ROADMAP.md."""
    counts = Counter(feature.state for feature in features)
    states = [f"| {state} | {meaning} | {counts[state]} |" for state, meaning in STATES.items()]
    text = HEAD + "\n".join(["| state | meaning | rows |", "|---|---|---|", *states]) + "\n"
    for area, rows in groupby(features, key=lambda feature: feature.area):
        lines = [f"\n## {area}\n", "| feature | state | limit, plan or reason | shown by |", "|---|---|---|---|"]
        lines += [f"| {f.name} | {f.state} | {f.note} | {', '.join(f'`{what}`' for what in f.shown)} |" for f in rows]
        text += "\n".join(lines) + "\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(read_features(TABLE.read_text())))
