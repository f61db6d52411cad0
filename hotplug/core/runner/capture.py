"""Captured executables: decode steps recorded once a shape and replayed, everything else op by op."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hotplug.core.ops.inputs import StepInputs
from hotplug.core.platform.base import DeviceInfo
from hotplug.core.platform.optional import HasCapture
from hotplug.core.runner.executable import EagerStep, StepOutputs
from hotplug.core.runner.static import StaticInputs, StepShape


def decode_shapes(max_num_seqs: int, max_shapes: int) -> list[StepShape]:
    """Shapes to capture, smallest first: powers of two up to `max_num_seqs`, the largest `max_shapes` of them.

    `max_shapes` 0 is no limit.
    """
    sizes = [max_num_seqs]
    power = 1 << max(max_num_seqs - 1, 1).bit_length() - 1
    while power >= 1:
        if power < max_num_seqs:
            sizes.append(power)
        power //= 2
    kept = sizes[:max_shapes] if max_shapes else sizes
    return [StepShape(size, size) for size in sorted(kept)]


class _Captured:
    """One shape's recorded step."""

    def __init__(self, eager: EagerStep, static: StaticInputs, platform: HasCapture, device: DeviceInfo) -> None:
        self.static = static
        self._outputs = eager(static.inputs)  # warm-up: what is made on first use must not be recorded

        def step() -> None:
            self._outputs = eager(static.inputs)

        self._replay = platform.capture(step, device)

    def __call__(self, step: StepInputs) -> StepOutputs:
        """The step's outputs; they hold until the next replay of this shape."""
        self.static.fill(step)
        self._replay()
        outputs = self._outputs
        return StepOutputs(outputs.hidden[: len(step.token_ids)], outputs.logits[: len(step.logit_indices)])


class CapturedSteps:
    """Replays the smallest captured shape that holds a step; prompt chunks and larger steps run eagerly."""

    recompiles = 0

    @torch.inference_mode()
    def __init__(
        self,
        eager: EagerStep,
        platform: HasCapture,
        device: DeviceInfo,
        *,
        shapes: Sequence[StepShape],
        max_blocks: int,
        index_dtype: torch.dtype,
        torch_device: torch.device,
    ) -> None:
        self._eager = eager
        self.shapes = tuple(shapes)
        self._captured = [
            _Captured(
                eager,
                StaticInputs(shape, max_blocks=max_blocks, index_dtype=index_dtype, device=torch_device),
                platform,
                device,
            )
            for shape in shapes
        ]

    def __call__(self, inputs: StepInputs) -> StepOutputs:
        attention = inputs.attention
        tokens, requests = len(inputs.token_ids), len(attention.seq_lens)
        for captured in self._captured:
            if captured.static.shape.holds(tokens, requests, attention.max_query_len):
                return captured(inputs)
        return self._eager(inputs)
