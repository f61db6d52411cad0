"""Measures the engines of the CPU comparison, an engine's rows in turns with hotplug at its defaults.

Engines are measured one after the other, so that their memory need not be there at once; within an engine, every
workload goes round all of its rows and the reference before it is repeated. Each row is a process of its own, idle
while another is measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from cpu import Peer, Worker, held, start_seconds
from cpu_engines.workloads import FIGURES as OF_WORKLOADS
from cpu_engines.workloads import WORKLOADS, Asked, Source, figures

from peers.records import Row, Run
from peers.settings import DEFAULTS, Engine

FIGURES = {
    "w1-first": ("ms", "lower"), "w1-decode": ("tok/s", "higher"), "w2-out": ("tok/s", "higher"),
    "w3-out": ("tok/s", "higher"), "w4-prompt": ("tok/s", "higher"), "start": ("s", "lower"),
    "rss": ("MiB", "lower"),
}  # fmt: skip
"""Figure -> unit, and which of two values is better."""
_NAMES = dict(
    zip(((workload, key) for workload, key, _, _ in OF_WORKLOADS),
        ("w1-first", "w1-decode", "w2-out", "w3-out", "w4-prompt"), strict=True)
)  # fmt: skip
WARM_UP_TOKENS = 4
LEAST_ROUNDS = 2
LONG_START = 15.0
"""Seconds: an engine that takes longer is started once, and that start is the figure."""


@dataclass
class Entry:
    """A row of the table: an engine with one form of the weights at one setting."""

    engine: str
    weights: str
    setting: str
    peer: Peer
    about: str = ""
    plan_hash: str | None = None
    values: dict[str, list[float]] = field(default_factory=dict)
    """Of each figure, a value a run."""
    others: float | None = None
    """Cores that other processes took while it was measured."""
    failed: str = ""
    """Why it was given up."""


def entries(engine: Engine, folder: Path, isa: str | None = None) -> list[Entry]:
    """All rows of an engine. `folder` holds the model in the forms that engines read."""
    settings = {setting.name: setting for setting in engine.settings}
    found = []
    for weights, names in engine.weights.items():
        for name in names:
            options = {**_model(engine.module, weights, folder), **settings[name].options}
            title = f"{engine.name} {weights}, {name}"
            peer = Peer(title, engine.module, engine.environment, options, settings[name].variables)
            narrow = held(peer, isa)
            found.append(Entry(engine.name, weights, name, replace(
                narrow, variables={**peer.variables, **narrow.variables})))  # fmt: skip
    return found


def _model(module: str, weights: str, folder: Path) -> dict[str, str]:
    """Where the weights are in this form, and what else says that it is to be this one."""
    file = str(folder / (weights if weights in ("Q4_0", "Q4_1", "Q8_0", "F16") else "Q4_1") / "model.gguf")
    match module:
        case "hotplug":
            return {"model": file, **({"dtype": weights, "quantization": "none"} if weights == "float32" else {})}
        case "llama_cpp" | "openvino":
            return {"model": file, "weights": weights}
    return {"model": str(folder / "hf")}


class Others:
    """How many cores are taken by what is not this process or its children: what a figure has to be read with."""

    def __init__(self) -> None:
        self._begin = (time.perf_counter(), _busy(), _own())

    def cores(self) -> float:
        """On average since it was made. What the hypervisor gave to other machines counts too."""
        begin, busy, own = self._begin
        return max(0.0, (_busy() - busy) - (_own() - own)) / (time.perf_counter() - begin)


def _busy() -> float:
    """Seconds that all processors of this machine were not idle."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


def _own() -> float:
    """Seconds of processor time of this process and of what it has started and is there."""
    total, me = 0.0, psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


class Bench:
    """One invocation: every engine's rows, in turns with the reference."""

    def __init__(
        self, run: Run, source: Source, reference: Callable[[], Entry], repeat: int, starts: int, seconds: float
    ) -> None:
        """`reference` makes hotplug's entry at its defaults, `starts` is how often an engine is started besides.

        Rounds of an engine's rows are `repeat`, or fewer, but two, where `seconds` are over.
        """
        self._run, self._source, self._reference = run, source, reference
        self._repeat, self._starts, self._seconds = repeat, starts, seconds

    def measure(self, engine: Engine, wanted: Sequence[Entry]) -> list[Row]:
        """The engine's rows. One that fails has its reason in the rows of the figures that it lacks."""
        missing = [entry for entry in wanted if not entry.peer.python.exists()]
        for entry in missing:
            entry.failed = f"its environment, .peers/{entry.peer.environment}, is not here: `make bench-peers`"
        here = [entry for entry in wanted if not entry.failed]
        beside = [] if engine.module == "hotplug" or not here else [self._reference()]
        self._together([*here, *beside])
        return [row for entry in wanted for row in self._rows(entry, beside[0] if beside else None)]

    def _together(self, entries: Sequence[Entry]) -> None:
        workers: dict[int, Worker] = {}

        def attempt(index: int, what: Callable[[], None]) -> None:
            try:
                what()
            except (RuntimeError, ValueError, BrokenPipeError) as e:
                entries[index].failed = str(e)
                print(f"{entries[index].peer.name}: {e}", file=sys.stderr)
                if index in workers:
                    workers.pop(index).stop()

        try:
            for index in range(len(entries)):
                attempt(index, lambda index=index: self._begin(index, entries[index], workers))
            begin, others = time.perf_counter(), Others()
            for number in range(self._repeat):
                if number >= LEAST_ROUNDS and time.perf_counter() - begin > self._seconds:
                    break
                for workload in WORKLOADS:
                    for index in list(workers):
                        attempt(index, lambda index=index, workload=workload, number=number: self._one(
                            entries[index], workers[index], workload, number))  # fmt: skip
            taken = others.cores()
            print(f"others took {taken:.2f} cores in the meantime", file=sys.stderr)
            for index, worker in workers.items():
                entries[index].others = taken
                entries[index].values["rss"] = [worker.rss() / 2**20]
        finally:
            for worker in workers.values():
                worker.stop()
        for _ in range(self._starts):
            for index, entry in enumerate(entries):
                if not entry.failed and entry.values["start"][0] < LONG_START:
                    attempt(index, lambda entry=entry: entry.values["start"].append(
                        start_seconds(entry.peer, self._source)))  # fmt: skip
        for entry in entries:
            if len(entry.values.get("start", [])) > 1:
                del entry.values["start"][0]  # the first one may have had caches to fill

    def _begin(self, index: int, entry: Entry, workers: dict[int, Worker]) -> None:
        """Start it, timed to a first token, and run every workload with a few tokens each."""
        begin = time.perf_counter()
        workers[index] = worker = Worker(entry.peer)
        worker.generate(Asked(self._source.w1(0).prompts, 1))
        entry.values["start"] = [time.perf_counter() - begin]
        entry.about, entry.plan_hash = worker.about, worker.plan_hash
        print(f"{entry.peer.name}: {entry.about}, {entry.values['start'][0]:.1f} s to a first token", file=sys.stderr)
        for position, workload in enumerate(WORKLOADS):
            asked: Asked = getattr(self._source, workload)(position)
            worker.generate(Asked(asked.prompts, min(WARM_UP_TOKENS, asked.new_tokens)))

    def _one(self, entry: Entry, worker: Worker, workload: str, number: int) -> None:
        """One run of a workload, of prompts that no earlier one had."""
        asked: Asked = getattr(self._source, workload)((number + 1) * len(WORKLOADS) + WORKLOADS.index(workload))
        for key, value in figures(workload, asked, worker.generate(asked)).items():
            entry.values.setdefault(_NAMES[workload, key], []).append(value)

    def _rows(self, entry: Entry, beside: Entry | None) -> list[Row]:
        rows = []
        for figure, (unit, better) in FIGURES.items():
            samples = entry.values.get(figure, [])
            rows.append(self._run.row(
                engine=entry.engine, weights=entry.weights, setting=entry.setting, figure=figure, unit=unit,
                better=better, samples=samples, plan_hash=entry.plan_hash,
                versions={"about": entry.about} if entry.about else None, others=entry.others,
                against=(beside.values.get(figure) or None) if beside and samples else None,
                not_measured=None if samples else entry.failed or "it gave no value",
            ))  # fmt: skip
        return rows


def reference(engine: Engine, folder: Path, isa: str | None) -> Callable[[], Entry]:
    """Makes hotplug's entry at its defaults, with the weights that it is shipped with."""
    first = next(iter(engine.weights))

    def make() -> Entry:
        return next(e for e in entries(engine, folder, isa) if (e.weights, e.setting) == (first, DEFAULTS))

    return make
