"""Filling a model from a checkpoint: every parameter exactly once, every mismatch named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hotplug.core.errors import UnsupportedModelError, WeightsError
from hotplug.core.layers.context import BuildContext
from hotplug.core.layers.destination import Destination
from hotplug.core.models.decoder import Decoder
from hotplug.core.models.families import MODELS
from hotplug.core.quant.packed_scheme import PackedRows
from hotplug.core.weights.checkpoint import Checkpoint
from hotplug.core.weights.config import ModelConfig
from hotplug.core.weights.dummy import DummyCheckpoint
from hotplug.core.weights.packed_matrix import PackedMatrix
from hotplug.core.weights.promised import some


def find_model(config: ModelConfig, models: Mapping[str, type[Decoder]] = MODELS) -> type[Decoder]:
    """The class of a config's architecture. Raises UnsupportedModelError."""
    cls = models.get(config.architecture)
    if cls is None:
        raise UnsupportedModelError(
            f"the architecture {config.architecture} is not built", hint=f"Supported: {', '.join(sorted(models))}."
        )
    return cls


def build_model(config: ModelConfig, ctx: BuildContext, models: Mapping[str, type[Decoder]] = MODELS) -> Decoder:
    """The model of a config, weights uninitialized. Raises UnsupportedModelError, PlanError."""
    return find_model(config, models)(ctx, config)


@torch.no_grad()
def load_weights(model: Decoder, checkpoint: Checkpoint) -> None:
    """Copy every tensor of the checkpoint to its destination. Raises WeightsError."""
    if isinstance(checkpoint, DummyCheckpoint):
        for name, destination in model.destinations():
            _fill(checkpoint, name, destination)
        return
    destinations: dict[str, Destination] = dict(model.destinations())
    missing = dict(destinations)
    unknown: list[str] = []
    for name, tensor in _parts(model, checkpoint, destinations):
        target = missing.pop(name, None)
        if target is None:
            unknown.append(name)
        elif target.shape != tensor.shape:
            raise WeightsError(
                f"the shape is {list(tensor.shape)}, the config makes it {list(target.shape)}", where=name
            )
        elif isinstance(tensor, PackedMatrix):
            assert isinstance(target, PackedRows)
            target.take(tensor)
        elif tensor is not target:  # else it was written there
            target.copy_(tensor)
    problems = [f"missing: {some(list(missing))}"] if missing else []
    problems += [f"not part of {model.config.architecture}: {some(unknown)}"] if unknown else []
    if problems:
        raise WeightsError("the checkpoint does not match its config", where=_files(checkpoint), why=problems)


def _parts(
    model: Decoder, checkpoint: Checkpoint, destinations: Mapping[str, Destination]
) -> Iterator[tuple[str, Tensor | PackedMatrix]]:
    """The checkpoint's tensors by the names of `destinations`: packed, or there already."""
    keep = {name for name, destination in destinations.items() if isinstance(destination, PackedRows)}

    def target(name: str, shape: tuple[int, ...]) -> Tensor | None:
        destination = destinations.get(name)
        if not isinstance(destination, Tensor) or destination.shape != shape or destination.dtype is not torch.float32:
            return None
        return destination if destination.is_cpu and destination.is_contiguous() else None

    for name, tensor in checkpoint.tensors(keep, target):
        if isinstance(tensor, PackedMatrix):
            yield name, tensor
        else:
            yield from model.named(name, tensor)


def _fill(checkpoint: DummyCheckpoint, name: str, destination: Destination) -> None:
    """Random weights, drawn in the destination itself if it is a tensor."""
    if isinstance(destination, torch.Tensor):
        checkpoint.fill(name, destination)
        return
    drawn = torch.empty(destination.shape, dtype=destination.dtype, device=destination.device)
    checkpoint.fill(name, drawn)
    destination.copy_(drawn)


def _files(checkpoint: Checkpoint) -> str:
    return ", ".join(f.name for f in checkpoint.files[:2]) or "checkpoint"
