"""The history: a SQLite file of runs, their figures and every sample, and its form as JSON lines.

What goes in and comes out are records (`track.records`). A record that is there already (same run, figure and commit
or peer) is not stored twice, so that importing a file again changes nothing.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from track import records
from track.records import Against, Record

SCHEMA = """
CREATE TABLE IF NOT EXISTS run (id TEXT PRIMARY KEY, machine TEXT NOT NULL, machine_facts TEXT NOT NULL,
    at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS figure (id INTEGER PRIMARY KEY, run TEXT NOT NULL REFERENCES run(id), name TEXT NOT NULL,
    unit TEXT NOT NULL, better TEXT NOT NULL, versions TEXT NOT NULL, plan_hash TEXT, "commit" TEXT, commit_date TEXT,
    subject TEXT NOT NULL, parent TEXT, peer TEXT, against TEXT, not_measured TEXT);
CREATE UNIQUE INDEX IF NOT EXISTS once ON figure (run, name, ifnull("commit", ''), ifnull(peer, ''));
CREATE TABLE IF NOT EXISTS sample (figure INTEGER NOT NULL REFERENCES figure(id), number INTEGER NOT NULL,
    value REAL NOT NULL, against REAL, PRIMARY KEY (figure, number)) WITHOUT ROWID;
"""
"""`position` of a commit follows from the parents; `sample.against` is the base's sample taken next to it."""


class History:
    """A history file, made if it is not there."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path)
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        self._db.close()

    def add(self, new: Iterable[Record]) -> int:
        """Store records, all or none; returns how many were not there before. Raises RecordError."""
        count = 0
        with self._db:
            for record in new:
                record.check()
                count += self._add(record)
        return count

    def _add(self, r: Record) -> int:
        self._db.execute("INSERT OR IGNORE INTO run VALUES (?, ?, ?, ?)",
                         (r.run, r.machine, json.dumps(r.machine_facts), r.at.isoformat()))  # fmt: skip
        date = None if r.commit_date is None else r.commit_date.isoformat()
        against = None if r.against is None else r.against.commit
        row = (r.run, r.figure, r.unit, r.better, json.dumps(r.versions), r.plan_hash, r.commit, date, r.subject,
               r.parent, r.peer, against, r.not_measured)  # fmt: skip
        made = self._db.execute(
            'INSERT OR IGNORE INTO figure (run, name, unit, better, versions, plan_hash, "commit", commit_date,'
            " subject, parent, peer, against, not_measured) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            row,
        )
        if not made.rowcount:
            return 0
        beside = r.against.samples if r.against is not None else [None] * len(r.samples)
        self._db.executemany(
            "INSERT INTO sample VALUES (?, ?, ?, ?)",
            [(made.lastrowid, i, value, other) for i, (value, other) in enumerate(zip(r.samples, beside, strict=True))],
        )
        return 1

    def records(self, machine: str | None = None) -> list[Record]:
        """Every record, or those of one machine class, in the order in which they were stored."""
        samples: dict[int, list[tuple[float, float | None]]] = {}
        for figure, value, other in self._db.execute(
            "SELECT figure, value, against FROM sample ORDER BY figure, number"
        ):
            samples.setdefault(figure, []).append((value, other))
        rows = self._db.execute(
            "SELECT f.id, run, machine, machine_facts, at, name, unit, better, versions, plan_hash,"
            ' "commit", commit_date, subject, parent, peer, against, not_measured'
            " FROM figure f JOIN run r ON f.run = r.id WHERE ? IS NULL OR machine = ? ORDER BY f.id",
            (machine, machine),
        )
        return [_record(row, samples.get(row[0], [])) for row in rows]

    def write_lines(self, path: Path) -> int:
        """Write everything as JSON lines; returns how many."""
        found = self.records()
        records.write(found, path)
        return len(found)

    def read_lines(self, path: Path) -> int:
        """Take in a file of JSON lines; returns how many records were new. Raises RecordError."""
        return self.add(records.read(path))


def _record(row: tuple, samples: list[tuple[float, float | None]]) -> Record:  # type: ignore[type-arg]
    (_, run, machine, machine_facts, at, name, unit, better, versions, plan_hash, commit, date, subject, parent, peer,
     against, not_measured) = row  # fmt: skip
    beside = None
    if against is not None:
        beside = Against(commit=against, samples=tuple(other for _, other in samples if other is not None))
    return Record(
        run=run, machine=machine, machine_facts=json.loads(machine_facts), versions=json.loads(versions),
        at=datetime.fromisoformat(at), figure=name, unit=unit, better=better,
        samples=tuple(value for value, _ in samples), commit=commit,
        commit_date=None if date is None else datetime.fromisoformat(date), subject=subject, parent=parent, peer=peer,
        plan_hash=plan_hash, against=beside, not_measured=not_measured,
    )  # fmt: skip
