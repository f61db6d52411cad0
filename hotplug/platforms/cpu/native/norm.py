"""Norms by the native library (`src/step.h`), in float32: one call a norm, with the residual added on the way."""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from hotplug.platforms.cpu.native.library import call, refusal
from hotplug.vendor import Impl, SiteSpec, Verdict

_call = struct.Struct("@5P4qd").pack
"""`hp_rms_norm_call`."""


def rms_norm(spec: SiteSpec) -> Callable[[Tensor, Tensor], Tensor]:
    """The op, for any strides of `x` [..., n]."""
    eps = spec["eps"]

    def run(x: Tensor, weight: Tensor) -> Tensor:
        rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()
        out = torch.empty(x.shape)
        _run(rows, None, weight, None, out, eps)
        return out

    return run


def add_rms_norm(spec: SiteSpec) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The op, for any strides of `x` and `residual` [num_tokens, n]."""
    eps = spec["eps"]

    def run(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        x = x if x.stride(1) == 1 else x.contiguous()
        residual = residual if residual.stride(1) == 1 else residual.contiguous()
        out, total = torch.empty(x.shape), torch.empty(x.shape)
        _run(x, residual, weight, total, out, eps)
        return out, total

    return run


def _run(x: Tensor, residual: Tensor | None, weight: Tensor, total: Tensor | None, out: Tensor, eps: float) -> None:
    call("hp_rms_norm", _call(
        x.data_ptr(), 0 if residual is None else residual.data_ptr(), weight.data_ptr(),
        0 if total is None else total.data_ptr(), out.data_ptr(),
        *x.shape, x.stride(0), 0 if residual is None else residual.stride(0), eps,
    ))  # fmt: skip


def _check(spec: SiteSpec) -> Verdict:
    if spec.dtype != "float32":
        return Verdict(False, f"normalizes float32, not {spec.dtype}")
    reason = refusal()
    return Verdict(reason is None, reason or "")


KERNELS = (
    Impl("rms_norm", "cpu.native", make=rms_norm, check=_check, rank=20),
    Impl("add_rms_norm", "cpu.native", make=add_rms_norm, check=_check, rank=20),
)
