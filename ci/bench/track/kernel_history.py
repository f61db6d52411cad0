"""What the Triton kernels take, over commits: the versions of ci/kernels_record/*.json in git's history.

A record is a file for a version of Triton: kernel -> how it was specialized -> target -> registers, spills and shared
memory (`ci/kernels.py` writes it). Nothing is compiled here.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

FOLDER = "ci/kernels_record"
OLD_FILE = "ci/kernels.json"
"""Held the record of one version of Triton before there was one for each."""

Figures = dict[str, int]
Kernels = dict[str, dict[str, dict[str, Figures]]]
Place = tuple[str, str, str]
"""Kernel, specialization, target."""


@dataclass(frozen=True)
class Origin:
    """The commit that wrote a record; a record that is in no commit yet has no id."""

    commit: str
    date: datetime | None
    subject: str


@dataclass(frozen=True)
class Snapshot:
    """One version of Triton's record, as a commit left it."""

    origin: Origin
    triton: str
    kernels: Kernels

    def cells(self) -> dict[Place, Figures]:
        return {
            (kernel, special, target): figures
            for kernel, specials in self.kernels.items()
            for special, targets in specials.items()
            for target, figures in targets.items()
        }


@dataclass(frozen=True)
class Step:
    """What a kernel takes from a commit on."""

    origin: Origin
    figures: Figures

    @property
    def registers(self) -> int:
        """Of a thread: NVIDIA's registers, AMD's vector registers."""
        return self.figures.get("registers", self.figures.get("vgprs", 0))

    @property
    def spilled(self) -> int:
        """Registers kept in memory, AMD's scalar ones among them."""
        return self.figures.get("spilled", 0) + self.figures.get("sgprs_spilled", 0)


@dataclass(frozen=True)
class History:
    """The record of one version of Triton over commits."""

    triton: str
    snapshots: tuple[Snapshot, ...]
    """Oldest first; each differs from the one before it."""
    steps: dict[Place, tuple[Step, ...]]
    """Of what the last snapshot holds: each step differs from the one before it."""

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(target for _, _, target in self.steps))

    @property
    def latest(self) -> dict[Place, Step]:
        return {place: steps[-1] for place, steps in self.steps.items()}


def histories(snapshots: Iterable[Snapshot]) -> list[History]:
    """A history for each version of Triton that the last origin has a record of, the newest version first.

    `snapshots` come oldest first.
    """
    snapshots = list(snapshots)
    last = {snapshot.triton for snapshot in snapshots if snapshot.origin == snapshots[-1].origin}
    by_version: dict[str, list[Snapshot]] = {}
    for snapshot in (s for s in snapshots if s.triton in last):
        kept = by_version.setdefault(snapshot.triton, [])
        if not kept or kept[-1].kernels != snapshot.kernels:
            kept.append(snapshot)
    found = [_history(version, kept) for version, kept in by_version.items()]
    return sorted(found, key=lambda h: [int(part) for part in h.triton.split(".") if part.isdigit()], reverse=True)


def _history(version: str, snapshots: list[Snapshot]) -> History:
    cells = [(snapshot.origin, snapshot.cells()) for snapshot in snapshots]
    steps = {}
    for place in cells[-1][1]:
        kept: list[Step] = []
        for origin, held in cells:
            figures = held.get(place)
            if figures is not None and (not kept or kept[-1].figures != figures):
                kept.append(Step(origin, figures))
        steps[place] = tuple(kept)
    return History(version, tuple(snapshots), steps)


# --- reading git ----------------------------------------------------------------------------------


def read(checkout: Path) -> list[Snapshot]:
    """Every record that a commit of the checkout changed, oldest first, and the working tree's where it differs.

    Where `checkout` is no git checkout, or git is missing, the working tree's alone.
    """
    return [*_committed(checkout), *_in_tree(checkout)]


def _committed(checkout: Path) -> Iterator[Snapshot]:
    # Along first parents: branches that were worked on at the same time are no sequence.
    log = _git(checkout, "log", "--first-parent", "--reverse", "--format=%H%x00%cI%x00%s", "--", FOLDER, OLD_FILE)
    for line in log.splitlines():
        commit, date, subject = line.split("\0")
        origin = Origin(commit, datetime.fromisoformat(date), subject)
        for path in _git(checkout, "ls-tree", "-r", "--name-only", commit, FOLDER, OLD_FILE).splitlines():
            yield _snapshot(origin, _git(checkout, "show", f"{commit}:{path}"), f"{path} of {commit}")


def _in_tree(checkout: Path) -> Iterator[Snapshot]:
    origin = Origin("", None, "the working tree")
    for path in sorted((checkout / FOLDER).glob("*.json")):
        yield _snapshot(origin, path.read_text(), str(path))


def _snapshot(origin: Origin, text: str, where: str) -> Snapshot:
    try:
        record = json.loads(text)
        return Snapshot(origin, record["triton"], record["kernels"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is no record of kernels: {error!r}") from error


def _git(checkout: Path, *arguments: str) -> str:
    """What git prints; nothing where the folder is in no repository, or there is no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""
