"""Writes the performance page: `python -m track.report --history FILE [--out FILE]`, ci/bench being on the path.

FILE is the history that `hotplug bench track` keeps, or JSON lines as it exports them.
"""

from __future__ import annotations

import argparse
import contextlib
import sqlite3
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from track import kernel_history, page, records, series

CHECKOUT = Path(__file__).parents[3]
HISTORY = Path(".bench/history.sqlite")
OUT = Path(".bench/performance.html")
SQLITE = b"SQLite format 3\0"
"""How a file of SQLite begins."""


def read(path: Path) -> list[records.Record]:
    """Every record of a history. Raises OSError where there is none, RecordError where it holds something else."""
    with path.open("rb") as file:
        is_sqlite = file.read(len(SQLITE)) == SQLITE
    if is_sqlite:
        from track.store import History

        with contextlib.closing(History(path)) as history:
            return history.records()
    return records.read(path)


def write(
    history: list[records.Record],
    change_points: series.ChangePoints,
    checkout: Path,
    out: Path,
    titles: Mapping[str, str] | None = None,
) -> None:
    """The page of a history, with the kernels' records of a checkout, as one file. `titles`: figure -> what it is."""
    machines = series.machines(history, change_points)
    kernels = kernel_history.histories(kernel_history.read(checkout))
    text = page.render(machines, kernels, datetime.now(UTC), titles)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and says where it is; 1 where the history cannot be read."""
    parser = argparse.ArgumentParser(prog="track.report", description=__doc__)
    parser.add_argument("--history", type=Path, default=CHECKOUT / HISTORY, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=CHECKOUT / OUT, help="default: %(default)s")
    asked = parser.parse_args(arguments)
    from track import detect, suite  # the detector loads a library

    titles = {figure.name: figure.title for probe in suite.PROBES for figure in probe.figures}
    try:
        history = read(asked.history)
        write(history, detect.change_points, CHECKOUT, asked.out, titles)
    except FileNotFoundError as error:
        print(f"{error.filename} does not exist; `hotplug bench track` makes a history", file=sys.stderr)
        return 1
    except sqlite3.Error as error:
        print(f"{asked.history} is no history that can be used: {error}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{asked.out}: {len(history)} records, {asked.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
