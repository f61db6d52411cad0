"""Filling a model from a checkpoint: every parameter exactly once, every mismatch named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hotplug.core.errors import UnsupportedModelError, WeightsError
from hotplug.core.layers.context import BuildContext
from hotplug.core.layers.destination import Destination
from hotplug.core.models.decoder import MODELS, Decoder
from hotplug.core.quant.stored import StoredRows
from hotplug.core.weights.checkpoint import Checkpoint
from hotplug.core.weights.config import ModelConfig
from hotplug.core.weights.dummy import DummyCheckpoint
from hotplug.core.weights.promised import some
from hotplug.core.weights.stored import StoredMatrix


def build_model(config: ModelConfig, ctx: BuildContext, models: Mapping[str, type[Decoder]] = MODELS) -> Decoder:
    """The model of a config, weights uninitialized. Raises UnsupportedModelError, PlanError."""
    cls = models.get(config.architecture)
    if cls is None:
        raise UnsupportedModelError(
            f"the architecture {config.architecture} is not built", hint=f"Supported: {', '.join(sorted(models))}."
        )
    return cls(ctx, config)


@torch.no_grad()
def load_weights(model: Decoder, checkpoint: Checkpoint) -> None:
    """Copy every tensor of the checkpoint to its place. Raises WeightsError."""
    if isinstance(checkpoint, DummyCheckpoint):
        for name, place in model.destinations():
            _fill(checkpoint, name, place)
        return
    places: dict[str, Destination] = dict(model.destinations())
    missing = dict(places)
    unknown: list[str] = []
    for name, tensor in _parts(model, checkpoint, places):
        target = missing.pop(name, None)
        if target is None:
            unknown.append(name)
        elif target.shape != tensor.shape:
            raise WeightsError(
                f"the shape is {list(tensor.shape)}, the config makes it {list(target.shape)}", where=name
            )
        elif isinstance(tensor, StoredMatrix):
            assert isinstance(target, StoredRows)
            target.take(tensor)
        elif tensor is not target:  # else it was written there
            target.copy_(tensor)
    problems = [f"missing: {some(list(missing))}"] if missing else []
    problems += [f"not part of {model.config.architecture}: {some(unknown)}"] if unknown else []
    if problems:
        raise WeightsError("the checkpoint does not match its config", where=_files(checkpoint), why=problems)


def _parts(
    model: Decoder, checkpoint: Checkpoint, places: Mapping[str, Destination]
) -> Iterator[tuple[str, Tensor | StoredMatrix]]:
    """The checkpoint's tensors by the names of `places`: in groups where a place takes them, or there already."""
    keep = {name for name, place in places.items() if isinstance(place, StoredRows)}

    def room(name: str, shape: tuple[int, ...]) -> Tensor | None:
        place = places.get(name)
        if not isinstance(place, Tensor) or place.shape != shape or place.dtype is not torch.float32:
            return None
        return place if place.is_cpu and place.is_contiguous() else None

    for name, tensor in checkpoint.tensors(keep, room):
        if isinstance(tensor, StoredMatrix):
            yield name, tensor
        else:
            yield from model.named(name, tensor)


def _fill(checkpoint: DummyCheckpoint, name: str, place: Destination) -> None:
    """Random weights, drawn where they stay if the place is a tensor."""
    if isinstance(place, torch.Tensor):
        checkpoint.fill(name, place)
        return
    drawn = torch.empty(place.shape, dtype=place.dtype, device=place.device)
    checkpoint.fill(name, drawn)
    place.copy_(drawn)


def _files(checkpoint: Checkpoint) -> str:
    return ", ".join(f.name for f in checkpoint.files[:2]) or "checkpoint"
