"""Steps of any size up to a shape, for platforms whose compiled steps take them as they come: nothing is padded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hotplug.core.ops.inputs import StepInputs
from hotplug.core.runner.schema import step_schema, to_tensors
from hotplug.core.runner.static import StepShape


class DynamicInputs:
    """What a program of varying sizes is traced with, and how a step becomes its arguments.

    `shape` bounds the tokens and requests of a step.
    """

    def __init__(
        self, shape: StepShape, *, num_tables: int, max_blocks: int, index_dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape = shape
        self.schema = step_schema(num_tables, dynamic=True)
        self._max_blocks = max_blocks
        self._index_dtype, self._device = index_dtype, device

    @property
    def max_query_len(self) -> int:
        return self.shape.num_tokens

    @property
    def examples(self) -> tuple[Tensor, ...]:
        """Tensors of the bounds' size, of two at least since tracing takes 1 for a constant; values mean nothing."""
        tokens, requests, blocks = (max(size, 2) for size in (*self.shape, self._max_blocks))
        sizes = {"tokens": tokens, "requests": requests, "requests + 1": requests + 1, "blocks": blocks,
                 "scores": requests, "kept": tokens}  # fmt: skip
        return tuple(
            torch.zeros([sizes[dim] for dim in given.dims], dtype=self._index_dtype, device=self._device)
            for given in self.schema
        )

    def dims(self, num_caches: int) -> tuple[dict[int, Any], ...]:
        """`dynamic_shapes` of `torch.export` for `examples` and caches, whose number of blocks varies too."""
        dim: dict[str, Any] = {name: torch.export.Dim(name) for name in ("tokens", "requests", "scores", "kept")}
        dim |= {"requests + 1": dim["requests"] + 1, "blocks": torch.export.Dim("columns")}
        pages = {0: torch.export.Dim("blocks")}
        given = [{at: dim[name] for at, name in enumerate(each.dims)} for each in self.schema]
        return (*given, *[pages] * num_caches)

    def arguments(self, step: StepInputs) -> tuple[Tensor, ...]:
        """A step's tensors as they are, and which hidden states it keeps: all, or the scored ones alone."""
        *tensors, scores = to_tensors(step)
        if step.scored is None:
            tokens = len(step.token_ids)
            kept = torch.arange(tokens, dtype=self._index_dtype, device=self._device)
        else:
            kept, scores = scores, torch.arange(len(scores), dtype=self._index_dtype, device=self._device)
        return (*tensors, scores, kept)
