"""Captured executables: whole decode steps, from row numbers to sampled tokens, recorded once a size and replayed.

What a step needs from the host is one small array; everything else is on the device. Steps with prompt chunks run
op by op.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from hotplug.core.platform.base import DeviceInfo
from hotplug.core.platform.optional import HasCapture
from hotplug.core.runner.batch import Batch
from hotplug.core.runner.executable import EagerStep, HostStep, StepOutputs
from hotplug.core.runner.static import StepShape
from hotplug.core.sample.sampler import Draw, Sampler

_FINE, _MIDDLE = 16, 256
"""Sizes are this far apart from the first on, and twice that above the second."""


def decode_shapes(max_num_seqs: int, max_shapes: int) -> list[StepShape]:
    """Shapes to capture, smallest first: powers of two, from 16 on multiples of 16 (32 above 256), and the largest.

    Padding costs little where reading the weights is most of a step, and much where the rows are. With `max_shapes`
    above 0, no more than that: powers of two below the largest.
    """
    powers = [1 << i for i in range(max_num_seqs.bit_length())]
    if max_shapes:
        sizes = sorted({*powers, max_num_seqs})[-max_shapes:]
    else:
        fine = range(_FINE, min(max_num_seqs, _MIDDLE) + 1, _FINE)
        coarse = range(_MIDDLE, max_num_seqs + 1, 2 * _FINE)
        sizes = sorted({max_num_seqs, *(p for p in powers if p < _FINE), *fine, *coarse})
    return [StepShape(size, size) for size in sizes]


class _Decodes:
    """One size: its input on the device, and a recorded step for each way to draw."""

    def __init__(self, size: int, eager: EagerStep, batch: Batch, sampler: Sampler, logits: torch.Tensor) -> None:
        self.size = size
        self._eager = eager
        self._batch = batch
        self._sampler = sampler
        self._logits = logits
        dtype, device = batch.index_dtype, batch.device
        self._input = torch.zeros((4, size), dtype=dtype, device=device)
        """Row, position, number of generated tokens and given token (-1 for the row's last) of each entry."""
        self._input[0], self._input[3] = batch.spare_row, -1
        self._query_start = torch.arange(size + 1, dtype=dtype, device=device)
        self._tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self._replay: dict[Draw, Callable[[], Any]] = {}

    def warm_up(self) -> None:
        """Run the step in every way: what is made on first use must not be recorded."""
        logits = self._logits_of_step()
        for draw in Draw:
            self._finish(draw, logits)

    def record(self, platform: HasCapture, device: DeviceInfo) -> None:
        self.warm_up()
        for draw in Draw:
            self._replay[draw] = platform.capture(partial(self._step, draw), device)

    def release(self) -> None:
        self._replay.clear()  # a platform's replay may hold the step, which is ours

    def __call__(self, step: HostStep) -> StepOutputs:
        plan, n = step.plan, len(step.plan.rows)
        staged = self._batch.stage((4, self.size))
        values = staged.numpy()
        values[0, :n], values[0, n:] = plan.rows, self._batch.spare_row
        values[1, :n], values[1, n:] = plan.start, 0
        values[2, :n], values[2, n:] = step.counters, 0
        values[3] = -1
        values[3, n - len(plan.drafts) : n] = plan.drafts
        self._input.copy_(staged, non_blocking=True)
        self._replay[step.draw]()
        if step.draw is Draw.LOGITS:
            return StepOutputs(None, self._logits[:n])
        return StepOutputs(None, None, self._tokens[:n])

    def _step(self, draw: Draw) -> None:
        self._finish(draw, self._logits_of_step())

    def _logits_of_step(self) -> torch.Tensor:
        rows, start, _, given = self._input.unbind()
        return self._eager.decode(self._batch.decodes(rows, start, given, self._query_start))

    def _finish(self, draw: Draw, logits: torch.Tensor) -> None:
        """What follows the scores: drawn tokens, in the batch too, or the scores themselves."""
        rows, _, counters, _ = self._input.unbind()
        if draw is Draw.LOGITS:  # kept in memory that all recorded steps share: the scores of each would be too much
            self._logits[: self.size] = logits
            return
        tokens = self._sampler.draw(logits, rows, counters, draw)
        self._batch.last_tokens[rows] = tokens.to(self._batch.index_dtype)
        self._tokens.copy_(tokens)


def _decodes(eager: EagerStep, batch: Batch, sampler: Sampler, shapes: Sequence[StepShape]) -> list[_Decodes]:
    """One a shape. They share the memory of the scores."""
    sizes = [shape.num_requests for shape in shapes]
    logits = torch.empty((sizes[-1], sampler.vocab), dtype=torch.float32, device=batch.device)
    return [_Decodes(size, eager, batch, sampler, logits) for size in sizes]


@torch.inference_mode()
def run_once(eager: EagerStep, batch: Batch, sampler: Sampler, shapes: Sequence[StepShape]) -> None:
    """Run what `CapturedSteps` would record of `shapes`, op by op."""
    for decodes in _decodes(eager, batch, sampler, shapes):
        decodes.warm_up()


class CapturedSteps:
    """Replays the smallest captured size that holds a step; prompt chunks and larger steps run eagerly."""

    recompiles = 0

    @torch.inference_mode()
    def __init__(
        self,
        eager: EagerStep,
        batch: Batch,
        sampler: Sampler,
        platform: HasCapture,
        device: DeviceInfo,
        shapes: Sequence[StepShape],
        recorded: Callable[[], object] = lambda: None,
    ) -> None:
        """Record `shapes` (smallest first) in every way to draw, the largest first; `recorded` is called after each."""
        self._eager = eager
        self.shapes = tuple(shapes)
        self._sizes = [shape.num_requests for shape in shapes]
        self._captured = _decodes(eager, batch, sampler, shapes)
        for captured in reversed(self._captured):  # the largest first, so that others fit into its memory
            captured.record(platform, device)
            recorded()

    def release(self) -> None:
        """Drop what was recorded, and with it its memory; no step can run any more."""
        for captured in self._captured:
            captured.release()

    def __call__(self, step: HostStep) -> StepOutputs:
        plan = step.plan
        at = bisect_left(self._sizes, len(plan.rows))
        if plan.num_decodes < len(plan.rows) or at == len(self._sizes):
            return self._eager(step)
        return self._captured[at](step)
