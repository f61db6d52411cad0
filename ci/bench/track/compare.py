"""Two trees compared: their processes run the same small probes in turns; what stands out is measured again.

A family's processes of both trees are there at the same time. Most take turns, so that a pair of samples is a fraction
of a second apart; what uses one thread runs in both at the same time (`suite.Placement`). What passes its threshold is
measured once more in fresh processes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

from track import detect
from track.detect import Effect, Finding, Floor
from track.probes.places import CannotError
from track.sides import Models, Side, open_side
from track.suite import FAMILIES, Probe, figures
from track.trees import Tree

PAUSE = 0.004
"""Seconds between two samples, after which the other tree's threads sleep."""

WARM = {"start": 1, "start-cpu": 0}
"""Runs before those that are kept, where it is not two: a first start fills the caches of files and of bytecode."""

Open = Callable[[Tree, str, Models], Side]


@dataclass
class Samples:
    """Of one figure, sample i of `head` next to sample i of `base`."""

    head: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)

    @property
    def effect(self) -> Effect:
        return detect.effect(self.head, self.base)


@dataclass
class Round:
    """What fresh processes of both trees gave."""

    samples: dict[str, Samples] = field(default_factory=dict)
    """By figure."""
    cannot: dict[str, str] = field(default_factory=dict)
    """By figure, why there are no samples."""
    plan_hashes: dict[str, str | None] = field(default_factory=dict)
    """By figure, the head's."""


@dataclass(frozen=True)
class Figures:
    """What a comparison found of one figure."""

    samples: Samples
    finding: Finding
    plan_hash: str | None = None
    not_measured: str | None = None
    rounds: int = 1


@dataclass(frozen=True)
class Bench:
    """How trees are measured. `open_side` starts a family's processes in a tree."""

    models: Models
    quick: bool = False
    open_side: Open = open_side

    def quads(self, probe: Probe) -> int:
        return probe.quick if self.quick else probe.full

    def measure(self, head: Tree, base: Tree, probes: Sequence[Probe]) -> Round:
        """One round of all probes."""
        found = Round()
        for family in FAMILIES:
            own = [probe for probe in probes if probe.family == family and self.quads(probe)]
            if own:
                begin = time.perf_counter()
                self._family(head, base, family, own, found)
                print(f"{family}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        return found

    def _family(self, head: Tree, base: Tree, family: str, probes: Sequence[Probe], found: Round) -> None:
        with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
            opening = {role: pool.submit(self.open_side, tree, family, self.models)
                       for role, tree in (("head", head), ("base", base))}  # fmt: skip
            sides: dict[str, Side] = {}
            reasons = []
            for role, one in opening.items():
                try:
                    sides[role] = one.result()
                    stack.callback(sides[role].close)
                except CannotError as e:
                    reasons.append(f"on {role}: {e}")
            for probe in probes:
                for figure in probe.figures:
                    if reasons:
                        found.cannot[figure.name] = "; ".join(reasons)
                    else:
                        found.plan_hashes[figure.name] = sides["head"].plan_hash
            if not reasons:
                self._take_turns(sides, probes, found)

    def _take_turns(self, sides: Mapping[str, Side], probes: Sequence[Probe], found: Round) -> None:
        """Quads of all probes, one of each after another, so that each figure's are spread over the whole time."""
        ready = [probe for probe in probes if self._warm_up(sides, probe, found)]
        for number in range(max((self.quads(probe) for probe in ready), default=0)):
            for probe in [probe for probe in ready if number < self.quads(probe)]:
                try:
                    self._quad(sides, probe, number % 2 == 1, found)
                except CannotError as e:
                    ready.remove(probe)
                    for figure in probe.figures:
                        found.samples.pop(figure.name, None)
                        found.cannot[figure.name] = str(e)

    def _warm_up(self, sides: Mapping[str, Side], probe: Probe, found: Round) -> bool:
        for role, side in sides.items():
            try:
                for _ in range(WARM.get(probe.name, 2)):
                    side.measure(probe.name)
            except CannotError as e:
                found.cannot.update({figure.name: f"on {role}: {e}" for figure in probe.figures})
                return False
        return True

    def _quad(self, sides: Mapping[str, Side], probe: Probe, turned: bool, found: Round) -> None:
        order = ("head", "base", "base", "head") if turned else ("base", "head", "head", "base")
        values = self._run([sides[role] for role in order], probe)
        taken = {role: [v for v, of in zip(values, order, strict=True) if of == role] for role in sides}
        for figure in probe.figures:
            samples = found.samples.setdefault(figure.name, Samples())
            samples.head += [values[figure.name] for values in taken["head"]]
            samples.base += [values[figure.name] for values in taken["base"]]

    def _run(self, sides: Sequence[Side], probe: Probe) -> list[dict[str, float]]:
        """What the four of a quad measure, in their order. Of two cores, each side gets each once."""
        cores = sorted(os.sched_getaffinity(0))
        first, last = cores[0], cores[min(1, len(cores) - 1)]
        if probe.placement == "shared":
            return _at_once(sides[:2], probe, [first, first]) + _at_once(sides[2:], probe, [last, last])
        if probe.placement == "apart" and first != last:
            return _at_once(sides[:2], probe, [first, last]) + _at_once(sides[2:], probe, [first, last])
        found = []
        for side in sides:
            time.sleep(PAUSE)
            found.append(side.measure(probe.name))
        return found

    def compare(self, head: Tree, base: Tree, probes: Sequence[Probe], floors: Mapping[str, Floor]
                ) -> dict[str, Figures]:  # fmt: skip
        """Measure, measure again what stands out, and judge; figures in the suite's order."""
        first = self.measure(head, base, probes)
        count = len(first.samples)
        suspects = {
            name
            for name, samples in first.samples.items()
            if name in floors and detect.passes(samples.effect, floors[name], count)
        }
        again = Round()
        if suspects:
            print(f"measuring again: {', '.join(sorted(suspects))}", file=sys.stderr, flush=True)
            again = self.measure(head, base, [p for p in probes if any(f.name in suspects for f in p.figures)])
        known, found = figures(), {}
        for name in [f.name for probe in probes for f in probe.figures if self.quads(probe)]:
            if name not in first.samples:
                found[name] = Figures(Samples(), Finding("not measured"), not_measured=first.cannot[name])
                continue
            rounds = [first.samples[name], *([again.samples[name]] if name in suspects & again.samples.keys() else [])]
            pooled = Samples([v for r in rounds for v in r.head], [v for r in rounds for v in r.base])
            finding = detect.judge([r.effect for r in rounds], pooled.effect, known[name].better, floors.get(name),
                                   count)  # fmt: skip
            found[name] = Figures(pooled, finding, first.plan_hashes.get(name), rounds=len(rounds))
        return found


def _at_once(sides: Sequence[Side], probe: Probe, cores: Sequence[int]) -> list[dict[str, float]]:
    with ThreadPoolExecutor(len(sides)) as pool:
        return list(pool.map(lambda side, core: side.measure(probe.name, core), sides, cores))
