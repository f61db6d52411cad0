"""Executables: how a step's inputs become its outputs. Eager is the one maker there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hotplug.core.layers.attention import KVBlocks
from hotplug.core.models.decoder import Decoder
from hotplug.core.ops.inputs import StepInputs


@dataclass(slots=True)
class StepOutputs:
    """What a step leaves on the device."""

    hidden: Tensor
    """[T, hidden] last hidden states."""
    logits: Tensor
    """float32 [S, vocab] scores of the tokens in `logit_indices`."""


class EagerStep:
    """Runs the model op by op."""

    def __init__(self, model: Decoder, kv: Sequence[KVBlocks]) -> None:
        self._model = model
        self._kv = kv

    def __call__(self, inputs: StepInputs) -> StepOutputs:
        hidden = self._model(inputs, self._kv)
        return StepOutputs(hidden, self._model.logits(hidden[inputs.logit_indices]))
