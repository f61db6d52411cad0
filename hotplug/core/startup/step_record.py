"""How many requests run at once, and how many tokens a step holds, where the user leaves it open.

More requests at once are more tokens a second, until the device has all the work that it can do together; then each
only waits longer for its next token. Where that is depends on the device and on the model's size, so it is measured
(`hotplug tune --defaults`) and kept as data: one file for each kind of device, of the user's own in the cache folder,
and of the platform's package (`HasStepSizes`). The entry of the model nearest in size counts, if it is near. Without
one, the platform's `Limits` decide.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from hotplug.core.config import MOST_REQUESTS, EngineConfig
from hotplug.core.platform.optional import HasStepSizes
from hotplug.core.platform.select import Selection
from hotplug.core.startup.measured_file import Count, Positive, read_measured
from hotplug.core.weights.config import ModelConfig
from hotplug.core.weights.source import cache_folder

SCHEMA = 1
NEAR = 2.0
"""Models whose weights differ by no more than this factor count as near."""
CLOSE_ENOUGH = 0.99
"""The fewest requests that reach this share of the best rate are taken: more would only make tokens come later."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One size of step and what it reached."""

    requests: Annotated[int, msgspec.Meta(gt=0, le=MOST_REQUESTS)]
    tokens: Count
    output_tokens_per_s: Positive
    gap_p99_ms: float
    """Between two tokens of a request."""

    def __post_init__(self) -> None:
        if self.tokens < self.requests:
            raise ValueError(f"a step of {self.tokens} tokens for {self.requests} requests")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What was measured of a model on a kind of device."""

    model: str
    weight_bytes: Count
    measured: Annotated[Sequence[Measured], msgspec.Meta(min_length=1)]
    about: Mapping[str, Any] = field(default_factory=dict)
    """The versions and the load it was measured with, for whoever reads the file."""

    @property
    def best(self) -> Measured:
        """The fewest requests whose rate is all but the best, with the tokens at which gaps are shortest."""
        least = CLOSE_ENOUGH * max(one.output_tokens_per_s for one in self.measured)
        return min(
            (m for m in self.measured if m.output_tokens_per_s >= least), key=lambda m: (m.requests, m.gap_p99_ms)
        )


class _File(msgspec.Struct):
    schema: Literal[1]
    entries: list[StepRecord]


@dataclass(frozen=True, slots=True)
class StepSize:
    """The most requests and tokens of a step, and why; None where the platform's limits decide."""

    requests: int | None
    tokens: int | None
    reason: str


def choose(config: EngineConfig, selection: Selection, model: ModelConfig, dtype_bytes: int) -> StepSize:
    """The size of a step that is left open. Raises ConfigError for a damaged file."""
    if config.max_num_seqs is not None and config.max_num_batched_tokens is not None:
        return StepSize(None, None, "asked for")
    size = weight_bytes(model, dtype_bytes) // config.tensor_parallel_size
    found = _nearest(size, _records(selection))
    if found is None:
        return StepSize(None, None, "the platform's; `hotplug tune --defaults` measures what is best here")
    record, whose = found
    best = record.best
    return StepSize(
        best.requests, best.tokens, f"measured {whose} with {record.model}, {record.weight_bytes / 1e9:.1f} GB"
    )


def weight_bytes(model: ModelConfig, dtype_bytes: int) -> int:
    """About what the matrices of a model take."""
    attention = model.hidden_size * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    dense = 3 * model.hidden_size * model.intermediate_size
    sparse = 3 * model.hidden_size * model.moe_intermediate_size * model.num_experts
    num_sparse = len(model.sparse_layers)
    layers = model.num_layers * attention + (model.num_layers - num_sparse) * dense + num_sparse * sparse
    tables = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return (layers + tables) * dtype_bytes


def own_file(selection: Selection) -> Path:
    """Where the user's own records of a device are."""
    name = f"{selection.platform.name}-{selection.device.name}"
    return cache_folder() / "step_sizes" / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name).strip('_')}.json"


def write(path: Path, record: StepRecord, device: str) -> None:
    """Add a record to a file, in the place of one of the same size. Raises ConfigError for a damaged file."""
    kept = [one for one in (read(path) if path.exists() else ()) if one.weight_bytes != record.weight_bytes]
    entries = sorted([*kept, record], key=lambda one: one.weight_bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    lines = ",\n  ".join(json.dumps({**asdict(one), "measured": [asdict(m) for m in one.measured]}) for one in entries)
    part.write_text(f'{{"schema": {SCHEMA}, "device": {json.dumps(device)}, "entries": [\n  {lines}\n]}}\n')
    part.rename(path)


def read(path: Path) -> Sequence[StepRecord]:
    """The records in a file. Raises ConfigError where it is damaged: it says how to be rid of it."""
    return read_measured(path, _File, "step sizes", "--defaults").entries


def _records(selection: Selection) -> list[tuple[StepRecord, str]]:
    """Those that there are for a device, with whose they are, the user's own first."""
    own, platform = own_file(selection), selection.platform
    shipped = platform.step_sizes(selection.device) if isinstance(platform, HasStepSizes) else None
    return [
        *((record, "here") for record in (read(own) if own.exists() else ())),
        *((record, f"on {selection.device.name}") for record in (read(shipped) if shipped is not None else ())),
    ]


def _nearest(size: int, records: Sequence[tuple[StepRecord, str]]) -> tuple[StepRecord, str] | None:
    """The record nearest to a model of `size` bytes; the first of those that are equally near."""

    def distance(found: tuple[StepRecord, str]) -> float:
        return abs(math.log(found[0].weight_bytes / size))

    near = [one for one in records if distance(one) <= math.log(NEAR)]
    return min(near, key=distance, default=None)
