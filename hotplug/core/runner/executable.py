"""Executables: how a planned step becomes its outputs. The eager one is here; see `capture` and `compile`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.models.decoder import Decoder
from hotplug.core.ops.inputs import StepInputs
from hotplug.core.runner.device_batch import DeviceBatch
from hotplug.core.runner.static import StepShape
from hotplug.core.runner.timing import PREPARE, StepTimer
from hotplug.core.sample.sampler import Draw
from hotplug.core.scheduler.plan import IntArray, StepPlan


@dataclass(slots=True)
class HostStep:
    """A step as the host knows it, S of its R entries with a token to sample."""

    plan: StepPlan
    """Unrolled: no verifications."""
    rows: IntArray
    """[S] batch rows that get a token."""
    draw: Draw
    """What sampling needs."""
    counters: npt.NDArray[np.int64]
    """[S] how many tokens each has generated before."""
    scored_only: bool
    """Whether nobody wants the hidden states of tokens that are not sampled."""
    timer: StepTimer
    """Where an executable marks the end of `PREPARE`."""


@dataclass(slots=True)
class StepOutputs:
    """What a step leaves on the device."""

    hidden: Tensor | None
    """[T, hidden] last hidden states; None where only those of sampled tokens were computed."""
    logits: Tensor | None
    """float32 [S, vocab] scores; None where `tokens` are drawn already."""
    tokens: Tensor | None = None
    """int64 [S] sampled tokens, where sampling was part of the executable; they are in the batch too."""


class Executable(Protocol):
    """Runs a step, its plan's new block table entries applied first; the outputs hold until the next call."""

    @property
    def shapes(self) -> tuple[StepShape, ...]:
        """The static shapes that it prepared, smallest first."""
        ...

    @property
    def recompiles(self) -> int:
        """Compilations that steps set off, beyond the prepared shapes."""
        ...

    def __call__(self, step: HostStep) -> StepOutputs: ...

    def wait(self) -> None:
        """Return when every prepared shape is there. Raises PlatformError where preparing one failed."""
        ...

    def report(self) -> dict[str, Any]:
        """The prepared shapes as plain data, and where they are compiled, what became of each."""
        ...

    def release(self) -> None:
        """Drop what was recorded, and with it its memory; no step can run any more."""
        ...


def listed(shapes: Sequence[StepShape]) -> dict[str, Any]:
    """The report of an executable whose shapes are all there."""
    return {"shapes": [list(shape) for shape in shapes]}


class EagerStep:
    """Runs the model op by op, with kernels that write to the caches in place."""

    shapes: tuple[StepShape, ...] = ()
    recompiles = 0

    def __init__(self, model: Decoder, kv: Sequence[KVBlocks], batch: DeviceBatch) -> None:
        self._model = model
        self._kv = kv
        self._batch = batch

    def __call__(self, step: HostStep) -> StepOutputs:
        inputs = self._batch.inputs(step.plan, scored_only=step.scored_only)
        step.timer.lap(PREPARE)
        return self.run(inputs)

    def wait(self) -> None:
        """At once: nothing is prepared."""

    def report(self) -> dict[str, Any]:
        return listed(self.shapes)

    def release(self) -> None:
        """Nothing: nothing was recorded."""

    def run(self, inputs: StepInputs) -> StepOutputs:
        """The outputs of prepared inputs."""
        hidden, _ = self._model(inputs, self._kv)
        if inputs.scored is not None:
            return StepOutputs(None, self._model.logits(hidden))
        return StepOutputs(hidden, self._model.logits(hidden[inputs.logit_indices]))

    def decode(self, inputs: StepInputs) -> Tensor:
        """Scores of a step with one token a request, in their order."""
        return self._model.logits(self._model(inputs, self._kv)[0])
