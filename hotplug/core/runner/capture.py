"""Captured executables: whole decode steps, from row numbers to sampled tokens, recorded once a size and replayed.

What a step needs from the host is one small array; everything else is on the device. Steps with prompt chunks run
op by op, or recorded too where the platform asks for it (`capture_prompts`). Sizes are recorded at start, or each when
it is first needed where the platform says that this costs nothing (`Limits.capture_on_use`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch

from hotplug.core.platform.base import DeviceInfo
from hotplug.core.platform.optional import HasCapture
from hotplug.core.runner import capture_prompts
from hotplug.core.runner.capture_prompts import PromptShape, RecordedPrompts
from hotplug.core.runner.device_batch import DeviceBatch
from hotplug.core.runner.executable import EagerStep, HostStep, StepOutputs, listed
from hotplug.core.runner.static import StepShape
from hotplug.core.runner.timing import PREPARE
from hotplug.core.sample.sampler import Draw, Sampler

_FINE, _MIDDLE = 16, 256
"""Sizes are this far apart from the first on, and twice that above the second."""
_STAGED = 4
"""Host tensors of one size: more than the steps in flight, so that none is filled while the device copies from it."""
_EXACT = 64
"""Sizes up to this are not padded where they are recorded on use."""

Capture = Callable[[Callable[[], None]], Callable[[], Any]]
"""`HasCapture.capture` on one device."""


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


def decode_shapes_on_use(max_num_seqs: int) -> list[StepShape]:
    """Shapes that may be captured where a size costs nothing before it is needed: nearly no padding."""
    exact = range(1, min(max_num_seqs, _EXACT) + 1)
    padded = range(_EXACT + _FINE, max_num_seqs + 1, _FINE)
    return [StepShape(size, size) for size in sorted({max_num_seqs, *exact, *padded})]


class _Decodes:
    """One size: its input on the device, and a recorded step for each way to draw."""

    def __init__(self, size: int, eager: EagerStep, batch: DeviceBatch, sampler: Sampler, logits: torch.Tensor) -> None:
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
        staged = [batch.stage((4, size)) for _ in range(_STAGED)]
        self._staged = cycle([(tensor, tensor.numpy()) for tensor in staged])
        """Host tensors that the input is sent from, in turn."""

    def warm_up(self) -> None:
        """Run the step in every way: what is made on first use must not be recorded."""
        logits = self._logits_of_step()
        for draw in Draw:
            self._finish(draw, logits)

    def record(self, capture: Capture) -> None:
        """Record every way to draw."""
        self.warm_up()
        for draw in Draw:
            self._replay[draw] = capture(partial(self._step, draw))

    def release(self) -> None:
        self._replay.clear()  # a platform's replay may hold the step, which is ours

    def __call__(self, step: HostStep, capture: Capture | None = None) -> StepOutputs:
        """Replay, or record with `capture` what was not recorded yet."""
        plan, n = step.plan, len(step.plan.rows)
        self._batch.update_tables(plan)
        staged, values = next(self._staged)
        values[0, :n], values[1, :n], values[2, :n] = plan.rows, plan.start, step.counters
        if n < self.size:
            values[0, n:], values[1:3, n:] = self._batch.spare_row, 0
        values[3] = -1
        if len(plan.drafts):
            values[3, n - len(plan.drafts) : n] = plan.drafts
        self._input.copy_(staged, non_blocking=True)
        step.timer.lap(PREPARE)
        replay = self._replay.get(step.draw)
        if replay is not None:
            replay()
        else:
            assert capture is not None
            self._replay[step.draw] = capture(partial(self._step, step.draw))
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


class _Sizes:
    """A `_Decodes` a shape, made when asked for. They share the memory of the scores."""

    def __init__(self, eager: EagerStep, batch: DeviceBatch, sampler: Sampler, shapes: Sequence[StepShape]) -> None:
        self.sizes = [shape.num_requests for shape in shapes]
        self._logits = torch.empty((self.sizes[-1], sampler.vocab), dtype=torch.float32, device=batch.device)
        self._step = eager, batch, sampler
        self.made: dict[int, _Decodes] = {}

    def __getitem__(self, size: int) -> _Decodes:
        if size not in self.made:
            self.made[size] = _Decodes(size, *self._step, self._logits)
        return self.made[size]


@torch.inference_mode()
def run_once(
    eager: EagerStep,
    batch: DeviceBatch,
    sampler: Sampler,
    shapes: Sequence[StepShape],
    prompts: Sequence[PromptShape] = (),
) -> None:
    """Run what `CapturedSteps` would record of these shapes, op by op."""
    decodes = _Sizes(eager, batch, sampler, shapes)
    for size in decodes.sizes:
        decodes[size].warm_up()
    for shape in prompts:
        RecordedPrompts(shape, eager, batch, sampler).warm_up()


class CapturedSteps:
    """Replays the smallest captured size that holds a step; what none holds runs eagerly."""

    recompiles = 0

    @torch.inference_mode()
    def __init__(
        self,
        eager: EagerStep,
        batch: DeviceBatch,
        sampler: Sampler,
        platform: HasCapture,
        device: DeviceInfo,
        shapes: Sequence[StepShape],
        recorded: Callable[[], object] = lambda: None,
        *,
        on_use: bool = False,
        prompts: Sequence[PromptShape] = (),
    ) -> None:
        """Record `prompts`, then `shapes` (smallest first), the largest first; `recorded` is called after each.

        With `on_use`, record nothing before a step needs it.
        """
        self._eager = eager
        self.shapes = (*shapes, *(StepShape(*shape.size) for shape in prompts))
        self._prompt_shapes = list(prompts)
        self._prompts = [RecordedPrompts(shape, eager, batch, sampler) for shape in prompts]
        self._decodes = _Sizes(eager, batch, sampler, shapes)
        self._capture = partial(platform.capture, device=device)
        for recorded_prompts in reversed(self._prompts):  # the largest first, so that others fit into its memory
            recorded_prompts.record(self._capture)
            recorded()
        if not on_use:
            for size in reversed(self._decodes.sizes):
                self._decodes[size].record(self._capture)
                recorded()

    def wait(self) -> None:
        """At once: what is recorded at start is, and the rest serves once it is needed."""

    def report(self) -> dict[str, Any]:
        return listed(self.shapes)

    def release(self) -> None:
        for decodes in self._decodes.made.values():
            decodes.release()
        for prompts in self._prompts:
            prompts.release()

    def __call__(self, step: HostStep) -> StepOutputs:
        plan, sizes = step.plan, self._decodes.sizes
        if plan.num_decodes < len(plan.rows):
            shape = capture_prompts.served(step, self._prompt_shapes)
            return self._eager(step) if shape is None else self._prompts[shape](step)
        at = bisect_left(sizes, len(plan.rows))
        if at == len(sizes):
            return self._eager(step)
        return self._decodes[sizes[at]](step, self._capture)
