"""Which execution mode is fastest for a model on a device, as measured there and kept as data.

`hotplug tune --modes` measures and writes; `bind` reads where `exec` is left open. Without a record the platform's
own order decides. A record belongs to one model, device, PyTorch and set of options that change what a step computes:
anything else finds no record, so that no figure is taken for another's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch

import hotplug
from hotplug.core.config import EngineConfig
from hotplug.core.platform.base import ExecMode
from hotplug.core.platform.select import Selection
from hotplug.core.startup.measured_file import Positive, read_measured
from hotplug.core.weights.config import ModelConfig
from hotplug.core.weights.source import cache_folder

SCHEMA = 1
OPTIONS = ("dtype", "quantization", "kv_cache_dtype", "block_size", "speculative", "force", "tensor_parallel_size")
"""Of the configuration: what changes the time of a step, as asked for."""


@dataclass(frozen=True, slots=True)
class ModeRecord:
    """What was measured of each mode."""

    figures: Mapping[ExecMode, Mapping[str, float]]
    """By mode: rates by name, the same names everywhere, more is better."""
    failed: Mapping[ExecMode, str] = field(default_factory=dict)
    """Modes that the platform has and that did not run, and why."""

    @property
    def order(self) -> list[ExecMode]:
        """The modes by the geometric mean of their rates, the fastest first."""
        return sorted(self.figures, key=self.score, reverse=True)

    def score(self, mode: ExecMode) -> float:
        """The geometric mean of a mode's rates."""
        rates = self.figures[mode].values()
        return math.exp(sum(map(math.log, rates)) / len(rates))


@dataclass(frozen=True, slots=True)
class ModeChoice:
    """What `exec` is taken to be where it is left open, and why."""

    mode: ExecMode | None
    """None: the platform's order."""
    reason: str


def choose(config: EngineConfig, selection: Selection, model: ModelConfig, modes: Sequence[ExecMode]) -> ModeChoice:
    """The mode for `exec=auto` among those that the platform has, in its order. Raises ConfigError for a bad record."""
    if config.exec != "auto":
        return ModeChoice(None, "asked for")
    if config.trace_ops:
        return ModeChoice(None, "ops are timed one by one")
    if config.tensor_parallel_size > 1:
        modes = [mode for mode in modes if mode is not ExecMode.COMPILE]
    if len(modes) < 2:
        return ModeChoice(None, "the platform has no other")
    path = record_file(config, selection, model)
    record = read(path) if path.exists() else None
    order = [] if record is None else [mode for mode in record.order if mode in modes]
    if record is None or not order:
        return ModeChoice(None, "first in the platform's order; `hotplug tune --modes` measures the others here")
    scores = [f"{mode} {record.score(mode) / record.score(order[0]):.2f}" for mode in order]
    return ModeChoice(order[0], f"fastest as measured here ({', '.join(scores)})")


def record_file(config: EngineConfig, selection: Selection, model: ModelConfig) -> Path:
    """Where the record of a model, device and options is."""
    facts = json.dumps(key(config, selection, model), sort_keys=True, default=_plain)
    return cache_folder() / "modes" / f"{hashlib.sha256(facts.encode()).hexdigest()[:24]}.json"


def key(config: EngineConfig, selection: Selection, model: ModelConfig) -> dict[str, Any]:
    """What a record belongs to."""
    architecture = dataclasses.asdict(model)
    del architecture["raw"]
    device = selection.device
    return {
        "schema": SCHEMA,
        "hotplug": hotplug.__version__,
        "torch": str(torch.__version__),
        "platform": selection.platform.name,
        "device": [device.name, device.arch, device.cores],
        "options": {name: getattr(config, name) for name in OPTIONS},
        "model": architecture,
    }


def write(path: Path, record: ModeRecord, about: Mapping[str, Any]) -> None:
    """Keep a record, with what it belongs to for whoever reads the file."""
    document = {
        "schema": SCHEMA,
        "figures": {str(mode): dict(rates) for mode, rates in record.figures.items()},
        "failed": {str(mode): why for mode, why in record.failed.items()},
        "about": about,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(document, indent=1, default=_plain) + "\n")
    part.rename(path)


class _File(msgspec.Struct):
    schema: Literal[1]
    figures: dict[ExecMode, Annotated[dict[str, Positive], msgspec.Meta(min_length=1)]]
    failed: dict[ExecMode, str]


def read(path: Path) -> ModeRecord:
    """The record in a file. Raises ConfigError where it is damaged: it says how to be rid of it."""
    found = read_measured(path, _File, "execution modes", "--modes")
    return ModeRecord(found.figures, found.failed)


def _plain(value: Any) -> Any:
    """What JSON lacks: sets, in order."""
    return sorted(value) if isinstance(value, frozenset) else str(value)
