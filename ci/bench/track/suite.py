"""The suite of the performance history, as data: every figure, and the probes that measure them.

A probe is one small measurement; it gives one or several figures. The same probe is run in two trees in turns
(`track.compare`), and a *quad* is four of its runs: base, head, head, base, or the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Placement = Literal["turns", "apart", "shared"]
"""How a pair is run. Cores differ in speed, by up to a third on virtual machines, and from second to second.

turns: one after the other, on all cores. apart: at the same time, each on a core of its own. shared: at the same time
on one core, for processor time of what uses one thread: the core's speed then changes for both alike.
"""


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    unit: str
    better: Literal["higher", "lower"] = "lower"


@dataclass(frozen=True)
class Probe:
    """One measurement, of milliseconds up to seconds."""

    name: str
    family: str
    """Probes of a family share a process in each tree."""
    figures: tuple[Figure, ...]
    full: int
    """Quads in the full tier."""
    quick: int
    """Quads in the quick tier, which fills histories; 0 leaves the probe out."""
    placement: Placement = "turns"


def _one(name: str, family: str, title: str, unit: str, full: int, quick: int,
         better: Literal["higher", "lower"] = "lower") -> Probe:  # fmt: skip
    placement: Placement = "shared" if family in ("kernel", "loop") else "turns"
    return Probe(name, family, (Figure(name, title, unit, better),), full, quick, placement)


_START = (
    Figure("start", "process start to first token", "s"),
    Figure("rss", "peak memory of that process", "MiB"),
)

PROBES: tuple[Probe, ...] = (
    _one("cpu-one", "cpu", "SmolLM2-135M on the CPU, one request", "tok/s", 20, 8, "higher"),
    _one("cpu-prompt", "cpu", "first token of a prompt of 1,024", "ms", 8, 3),
    _one("cpu-16", "cpu", "16 requests at once", "tok/s", 12, 5, "higher"),
    _one("cpu-prefix", "cpu", "8 requests that share a prefix of 256 tokens", "tok/s", 12, 5, "higher"),
    _one("kernel-linear-1", "kernel", "product Q4_1 576 -> 3072, 1 row", "us", 14, 6),
    _one("kernel-linear-16", "kernel", "product Q4_1 576 -> 3072, 16 rows", "us", 14, 6),
    _one("kernel-linear-128", "kernel", "product Q4_1 576 -> 3072, 128 rows", "us", 14, 6),
    _one("kernel-attention-16", "kernel", "attention, 16 decodes at 200", "us", 14, 6),
    _one("kernel-attention-prompt", "kernel", "attention, chunk of 256 at 512", "us", 14, 6),
    _one("loop-64", "loop", "engine loop, 64 decoding requests", "ms/step", 14, 8),
    _one("loop-256", "loop", "engine loop, 256 decoding requests", "ms/step", 14, 8),
    _one("loop-1024", "loop", "engine loop, 1,024 decoding requests", "ms/step", 14, 8),
    _one("stream", "http", "64 HTTP streams of the null device", "tok/s", 30, 14, "higher"),
    _one("ttft", "http", "first token of a chat over HTTP", "ms", 40, 20),
    Probe("start", "start", _START, 3, 1, "apart"),
    Probe("start-cpu", "start", (Figure("start-cpu", "processor time of a start", "s"),), 3, 2, "shared"),
    _one("gpu-llama8b-decode1", "gpu-llama8b", "Llama-8B, 1 request", "ms/token", 3, 2),
    _one("gpu-llama8b-decode64", "gpu-llama8b", "Llama-8B, 64 requests", "tok/s", 2, 1, "higher"),
    _one("gpu-llama8b-prefill", "gpu-llama8b", "Llama-8B, prompts of 4,096", "tok/s", 2, 1, "higher"),
    _one("gpu-llama1b-decode1", "gpu-llama1b", "Llama-1B, 1 request", "ms/token", 3, 2),
    _one("gpu-llama1b-decode64", "gpu-llama1b", "Llama-1B, 64 requests", "tok/s", 2, 1, "higher"),
    _one("gpu-llama1b-mixed", "gpu-llama1b", "Llama-1B, 512 requests of 512 tokens", "tok/s", 2, 1, "higher"),
)

FAMILIES = tuple(dict.fromkeys(probe.family for probe in PROBES))
"""In the order in which they are measured."""


def figures() -> dict[str, Figure]:
    return {figure.name: figure for probe in PROBES for figure in probe.figures}


def select(names: Sequence[str], *, gpu: bool) -> list[Probe]:
    """Probes whose name, or a figure's, begins with one of `names`; all if there is none. GPU cells only with `gpu`.

    Raises ValueError for a name that no probe begins with.
    """
    probes = [probe for probe in PROBES if gpu or not probe.family.startswith("gpu-")]
    for name in names:
        if not any(_named(probe, (name,)) for probe in probes):
            raise ValueError(f"no figure begins with {name!r}; there are {', '.join(_figure_names(probes))}")
    return [probe for probe in probes if not names or _named(probe, names)]


def _named(probe: Probe, names: Iterable[str]) -> bool:
    begins = tuple(names)
    return probe.name.startswith(begins) or any(figure.name.startswith(begins) for figure in probe.figures)


def _figure_names(probes: Iterable[Probe]) -> list[str]:
    return [figure.name for probe in probes for figure in probe.figures]
