"""Weights as eight-bit integers with a scale a row (weight-only, symmetric)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hotplug.plugins import Op


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`x` [num_tokens, in] times (`weight` int8 [out, in] by `scale` float32 [out]) transposed, plus `bias` [out]."""
    out = (x @ weight.to(x.dtype).t()) * scale.to(x.dtype)
    return out if bias is None else out + bias


class Int8:
    """The scheme `int8`."""

    op = Op("linear_int8", linear_int8, facts=("in_features", "out_features", "bias"))

    def tensors(self, out_features: int, in_features: int) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"weight": ((out_features, in_features), torch.int8), "scale": ((out_features,), torch.float32)}

    def quantize(self, weight: Tensor) -> Sequence[Tensor]:
        scale = weight.abs().amax(-1).clamp(min=1e-12) / 127
        return (weight / scale.unsqueeze(1)).round().to(torch.int8), scale
