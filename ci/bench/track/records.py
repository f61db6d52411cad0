"""The records of the performance history, and their form as JSON lines: one line for a figure of a run.

A record is either about a commit of hotplug or about a peer, an engine that hotplug is compared with. It holds the raw
samples; medians and intervals are computed where they are read (`track.series`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

Moment = Annotated[datetime, msgspec.Meta(tz=True)]
"""A date and time with its time zone."""


class RecordError(ValueError):
    """A line of a history that is no record; the message says where and why."""


class Against(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The base commit that a figure was measured beside, in turns."""

    commit: str
    samples: tuple[float, ...]
    """Sample i was taken next to sample i of the record."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure of one run on one machine."""

    run: str
    """Names the run; several figures share it."""
    machine: str
    """The machine class: figures are compared within one."""
    machine_facts: dict[str, Any]
    versions: dict[str, str]
    at: Moment
    """When the run began."""
    figure: str
    unit: str
    better: Literal["higher", "lower"]
    samples: tuple[float, ...]
    """In `unit`; empty where the figure was not measured."""
    commit: str | None = None
    commit_date: Moment | None = None
    subject: str = ""
    """The first line of the commit's message."""
    parent: str | None = None
    """The commit's first parent."""
    peer: str | None = None
    """The engine measured, in place of a commit."""
    plan_hash: str | None = None
    """Identifies the kernel plan that ran; none where the figure runs no model."""
    against: Against | None = None
    not_measured: str | None = None
    """Why there are no samples."""

    def check(self) -> None:
        """Raises RecordError where fields contradict each other, which their types do not show."""
        if (self.commit is None) == (self.peer is None):
            raise RecordError("exactly one of `commit` and `peer` must be given")
        if self.commit is not None and self.commit_date is None:
            raise RecordError("`commit` is given without `commit_date`")
        if bool(self.samples) == (self.not_measured is not None):
            raise RecordError("exactly one of `samples` and `not_measured` must be given")
        _check_samples("samples", self.samples)
        if self.against is not None:
            _check_samples("against.samples", self.against.samples)
            if len(self.against.samples) != len(self.samples):
                raise RecordError(
                    f"samples are paired: {len(self.samples)} in `samples`, {len(self.against.samples)} in `against`"
                )


def _check_samples(field: str, samples: tuple[float, ...]) -> None:
    wrong = [s for s in samples if not math.isfinite(s) or s < 0]
    if wrong:
        raise RecordError(f"`{field}` must hold finite numbers of at least 0, and holds {wrong[0]}")


_decoder = msgspec.json.Decoder(Record)
_encoder = msgspec.json.Encoder()


def decode(line: bytes | str) -> Record:
    """The record of one JSON line. Raises RecordError where it is none."""
    try:
        record = _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecordError(str(error)) from None
    record.check()
    return record


def encode(record: Record) -> bytes:
    """One line of JSON, without its end. Raises RecordError where `decode` would not take it back."""
    record.check()
    return _encoder.encode(record)


def read(path: Path) -> list[Record]:
    """Every record of a file of JSON lines; empty lines are passed over. Raises RecordError, with the line's number."""
    records = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    records.append(decode(line))
                except RecordError as error:
                    raise RecordError(f"{path}, line {number}: {error}") from None
    return records


def write(records: Iterable[Record], path: Path) -> None:
    """Writes a file of JSON lines, in place of what was there."""
    lines = [encode(record) + b"\n" for record in records]
    path.write_bytes(b"".join(lines))
