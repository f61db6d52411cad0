"""`hotplug bench track` and `make bench-check`: measure commits beside each other, keep what is found, say what moved.

hotplug bench track                      the work tree beside origin/main, into the history
hotplug bench track --check              the same, and exit status 1 where a figure got worse
hotplug bench track --base A --head B    any two commits
hotplug bench track --noise 10           a commit ten times beside itself: the noise floor that judges the others
hotplug bench track --last 30            each of the last 30 states of the branch, beside the oldest of them
hotplug bench track --export FILE        the history as JSON lines; --import FILE takes such a file in
"""

from __future__ import annotations

import argparse
import signal
import sqlite3
import sys
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from track import detect, machine, records, table, trees
from track.compare import Bench, Figures
from track.detect import Floor
from track.records import Against, Record
from track.sides import Models
from track.store import History
from track.suite import figures, select
from track.trees import WORK_TREE, Commit, Tree, TreeError

ROOT = Path(__file__).parents[3]
CACHE = ROOT / ".bench"
REGRESSION, UNUSABLE = 1, 2
DIGITS = 5
"""Of a sample that is kept."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="hotplug bench track", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("--base", help="commit to compare with; default: origin/main, or main where there is none")
    made.add_argument("--head", default=WORK_TREE, help="commit to measure; default: the files as they are")
    made.add_argument("--history", type=Path, default=CACHE / "history.sqlite", metavar="FILE")
    made.add_argument("--figures", nargs="+", default=[], metavar="NAME", help="figures whose names begin so")
    made.add_argument("--quick", action="store_true", help="about half of the samples, and none of the costly")
    made.add_argument("--check", action="store_true", help="exit with 1 where a figure got worse")
    made.add_argument("--model", default="smollm2", help="the model of the CPU's figures")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--noise", type=_count, metavar="RUNS", help="measure --head beside itself")
    what.add_argument("--last", type=_count, metavar="COMMITS", help="measure the last states up to --head")
    what.add_argument("--export", type=Path, metavar="FILE", help="write the history as JSON lines")
    what.add_argument("--import", type=Path, metavar="FILE", dest="take_in", help="take in JSON lines")
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    with ExitStack() as stack:
        return _act(options, stack)


def _act(options: argparse.Namespace, stack: ExitStack) -> int:
    try:
        history = History(options.history)
        stack.callback(history.close)
        if options.export is not None:
            print(f"{history.write_lines(options.export)} records written to {options.export}")
            return 0
        if options.take_in is not None:
            print(f"{history.read_lines(options.take_in)} new records")
            return 0
        return Tool(options, history).run()
    except sqlite3.Error as e:
        print(f"error: {options.history} is no history that can be used: {e}", file=sys.stderr)
        return UNUSABLE
    except (TreeError, records.RecordError, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return UNUSABLE


def _count(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of at least 1")
    return int(text)


class Tool:
    """One use of the tool. `bench` measures; the rest finds commits, lays out trees and keeps records."""

    def __init__(self, options: argparse.Namespace, history: History, bench: Bench | None = None,
                 root: Path = ROOT, cache: Path = CACHE) -> None:  # fmt: skip
        self.options, self.history, self.root, self.cache = options, history, root, cache
        self.facts = machine.facts()
        self.machine = machine.machine_class(self.facts)
        self.versions = machine.versions()
        self.probes = select(options.figures, gpu=bool(self.facts["gpus"]))
        self.bench = bench if bench is not None else Bench(Models(options.model, _null_model()), options.quick)

    def run(self) -> int:
        if self.options.noise is not None:
            return self.noise(trees.find_commit(self.root, self.options.head), self.options.noise)
        if self.options.last is not None:
            return self.fill(trees.last_commits(self.root, self._name(self.options.head), self.options.last))
        base = self.options.base or self._default_base()
        return self.check(trees.find_commit(self.root, self.options.head), trees.find_commit(self.root, base))

    def _name(self, head: str) -> str:
        return trees.find_commit(self.root, head).id if head != WORK_TREE else "HEAD"

    def _default_base(self) -> str:
        for name in ("origin/main", "main"):
            try:
                trees.find_commit(self.root, name)
            except TreeError:
                continue
            return name
        raise TreeError("there is neither origin/main nor main to compare with; name a commit with --base")

    def check(self, head: Commit, base: Commit) -> int:
        """Measure two commits, print what was found; 1 where `--check` is asked for and something got worse."""
        with ExitStack() as stack:
            found = self._compared(stack.enter_context(self._tree(head, "head")),
                                   stack.enter_context(self._tree(base, "base")))  # fmt: skip
        print(f"{_short(head)}\nbeside {_short(base)}\nmachine class {self.machine}\n")
        print(table.of(found))
        worse = [name for name, one in found.items() if one.finding.verdict == "worse"]
        if any(one.finding.verdict == "not judged" for one in found.values()):
            print(f"\nFigures are not judged without a noise floor of this machine class: `hotplug bench track --noise "
                  f"10{' --quick' if self.bench.quick else ''}` measures it.")  # fmt: skip
        print(f"\n{'worse: ' + ', '.join(worse) if worse else 'nothing got worse'}")
        return REGRESSION if worse and self.options.check else 0

    def noise(self, commit: Commit, runs: int) -> int:
        """Measure a commit beside itself, `runs` times, in a single round each."""
        for number in range(runs):
            with self._tree(commit, "head") as head, self._tree(commit, "base") as base:
                self._compared(head, base, judged=False)
            print(f"noise: {number + 1} of {runs}", file=sys.stderr, flush=True)
        floors = self.floors()
        print(table.of_floors(floors))
        return 0

    def fill(self, commits: list[Commit]) -> int:
        """Measure each of these commits beside the first of them; those that are there are not measured again."""
        base = commits[0]
        known = {(r.commit, r.against.commit) for r in self.history.records(self.machine) if r.against is not None}
        with self._tree(base, "base") as base_tree:
            for number, commit in enumerate(commits, 1):
                if (commit.id, base.id) not in known:
                    with self._tree(commit, "head") as tree:
                        self._compared(tree, base_tree, judged=False)
                print(f"{number} of {len(commits)}: {_short(commit)}", file=sys.stderr, flush=True)
        return 0

    def floors(self) -> dict[str, Floor]:
        """What judges a round of this tier on this machine class."""
        samples = {figure.name: 2 * self.bench.quads(probe) for probe in self.probes for figure in probe.figures}
        return detect.floors(self.history.records(self.machine), self.machine, samples)

    def _tree(self, commit: Commit, role: str) -> Any:
        return trees.laid_out(self.root, self.cache, commit, role)

    def _compared(self, head: Tree, base: Tree, judged: bool = True) -> dict[str, Figures]:
        at = datetime.now(UTC)
        floors = self.floors() if judged else {}
        found = self.bench.compare(head, base, self.probes, floors)
        self.history.add(self._records(head.commit, base.commit, found, at))
        return found

    def _records(self, head: Commit, base: Commit, found: Mapping[str, Figures], at: datetime) -> list[Record]:
        run, known = uuid.uuid4().hex[:12], figures()
        return [
            Record(
                run=run, machine=self.machine, machine_facts=self.facts, versions=self.versions, at=at, figure=name,
                unit=known[name].unit, better=known[name].better, samples=_rounded(one.samples.head), commit=head.id,
                commit_date=head.date, subject=head.subject, parent=head.parent, plan_hash=one.plan_hash,
                against=Against(commit=base.id, samples=_rounded(one.samples.base)) if one.samples.base else None,
                not_measured=one.not_measured,
            )
            for name, one in found.items()
        ]  # fmt: skip


def _rounded(samples: list[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.{DIGITS}g}") for value in samples)


def _short(commit: Commit) -> str:
    return f"{commit.id[:12]} {commit.subject}"


def _null_model() -> str:
    from host_engines.model import model_folder

    return str(model_folder())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that servers and trees go too
    sys.exit(main())
