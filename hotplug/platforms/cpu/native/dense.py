"""Embedding and gating by the native library (`src/step.h`), in float32. Products are in `linear` and `packed`."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from hotplug.platforms.cpu.native.library import call, refusal
from hotplug.vendor import Impl, SiteSpec, Verdict

_silu_mul_call = struct.Struct("@2P3q").pack
"""`hp_silu_mul_call`."""
_embed_call = struct.Struct("@3P5q").pack
"""`hp_embed_call`."""


def silu_mul(gate_up: Tensor) -> Tensor:
    """The op, for any strides of `gate_up` [num_tokens, 2n]."""
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, width))
    call("hp_silu_mul", _silu_mul_call(gate_up.data_ptr(), out.data_ptr(), tokens, width, gate_up.stride(0)))
    return out


def embed(token_ids: Tensor, weight: Tensor) -> Tensor:
    """The op, for a contiguous table. Raises PlatformError for a token that there is none of."""
    return rows_of_table(token_ids, weight, weight.shape[1], 0)


def rows_of_table(token_ids: Tensor, table: Tensor, hidden: int, kind: int) -> Tensor:
    """Float32 [num_tokens, hidden] of `table`, contiguous and of GGUF's type `kind`, or float32 where that is 0.

    Raises ValueError for int32 tokens.
    """
    if token_ids.dtype is not torch.int64:
        raise ValueError("tokens must be int64, the CPU platform's index dtype")
    token_ids = token_ids.contiguous()
    out = torch.empty((len(token_ids), hidden))
    call("hp_embed", _embed_call(
        token_ids.data_ptr(), table.data_ptr(), out.data_ptr(), len(token_ids), table.shape[0], hidden,
        table.stride(0) * table.element_size(), kind,
    ))  # fmt: skip
    return out


def _check(spec: SiteSpec) -> Verdict:
    if spec.dtype != "float32":
        return Verdict(False, f"is for float32, not {spec.dtype}")
    reason = refusal()
    return Verdict(reason is None, reason or "")


KERNELS = (
    Impl("silu_mul", "cpu.native", make=lambda _: silu_mul, check=_check, rank=10),
    Impl("embed", "cpu.native", make=lambda _: embed, check=_check, rank=10),
)
