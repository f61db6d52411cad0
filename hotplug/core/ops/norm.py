"""Root-mean-square normalization (Zhang and Sennrich, 2019), alone and with the residual added first."""

from __future__ import annotations

import torch
from torch import Tensor

from hotplug.core.ops.registry import Bind, Fn, Op, SiteSpec


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` [..., n] over the root of its mean square, times `weight` [n]; computed in float32, dtype of `x`."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of `x` and `residual` [num_tokens, n], normalized, and the sum itself (the next residual)."""
    residual = x + residual
    return rms_norm(residual, weight, eps), residual


def lower_add_rms_norm(bind: Bind, spec: SiteSpec) -> Fn:
    norm = bind("rms_norm", "norm", width=spec["width"], eps=spec["eps"])

    def composed(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        residual = x + residual
        return norm(residual, weight), residual

    return composed


OPS = (
    Op("rms_norm", rms_norm, facts=("width", "eps")),
    Op("add_rms_norm", add_rms_norm, facts=("width", "eps"), lower=lower_add_rms_norm),
)
