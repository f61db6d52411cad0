"""Executables: how a step's inputs become its outputs. The eager one is here; see `capture` for recorded steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hotplug.core.layers.attention import KVBlocks
from hotplug.core.models.decoder import Decoder
from hotplug.core.ops.inputs import StepInputs
from hotplug.core.runner.static import StepShape


@dataclass(slots=True)
class StepOutputs:
    """What a step leaves on the device."""

    hidden: Tensor
    """[T, hidden] last hidden states."""
    logits: Tensor
    """float32 [S, vocab] scores of the tokens in `logit_indices`."""


class Executable(Protocol):
    """Runs the step that `inputs` describe; the outputs hold until the next call."""

    @property
    def shapes(self) -> tuple[StepShape, ...]:
        """The static shapes that it prepared, smallest first."""
        ...

    @property
    def recompiles(self) -> int:
        """Compilations that steps set off, beyond the prepared shapes."""
        ...

    def __call__(self, inputs: StepInputs) -> StepOutputs: ...


class EagerStep:
    """Runs the model op by op, with kernels that write to the caches in place."""

    shapes: tuple[StepShape, ...] = ()
    recompiles = 0

    def __init__(self, model: Decoder, kv: Sequence[KVBlocks]) -> None:
        self._model = model
        self._kv = kv

    def __call__(self, inputs: StepInputs) -> StepOutputs:
        hidden, _ = self._model(inputs, self._kv)
        return StepOutputs(hidden, self._model.logits(hidden[inputs.logit_indices]))
