"""A weight quantization scheme: an op in the place of `linear`, its tensors, and how a weight becomes them.

Weights are quantized as they are loaded, from a checkpoint in floating point. A layer's tensors have one row an output
feature, so that checkpoint matrices that a layer stacks are quantized one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hotplug.core.ops.registry import Op

NONE = "none"
"""What `Limits.quantization` calls plain floating point."""
ANY = "*"
"""In `Limits.quantization`: any other scheme too, by its reference."""


class QuantScheme(Protocol):
    """One way to store the weight of a linear layer."""

    @property
    def op(self) -> Op:
        """`op(x, *tensors, bias)`, facts in_features, out_features and bias; its reference defines the scheme."""
        ...

    def tensors(self, out_features: int, in_features: int) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each stored tensor by name, in the order of the op; each has out_features rows."""
        ...

    def quantize(self, weight: Tensor) -> Sequence[Tensor]:
        """The stored tensors of `weight` [rows, in_features], in the same order, on its device."""
        ...


class QuantizedRows:
    """Destination of some rows of a quantized layer (`hotplug.core.layers.destination.Destination`)."""

    def __init__(self, scheme: QuantScheme, rows: Sequence[Tensor], in_features: int, dtype: torch.dtype) -> None:
        self._scheme = scheme
        self._rows = rows
        self.shape = torch.Size((rows[0].shape[0], in_features))
        self.dtype = dtype
        self.device = rows[0].device

    def copy_(self, source: Tensor, /) -> None:
        stored = self._scheme.quantize(source.to(self.device, torch.float32))
        for target, tensor in zip(self._rows, stored, strict=True):
            target.copy_(tensor)
