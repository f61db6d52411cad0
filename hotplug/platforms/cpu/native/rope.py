"""Rotation and cache write as one call of the native library (`src/rope.h`), for float32 throughout."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from hotplug.platforms.cpu.native.library import call, refusal
from hotplug.vendor import Impl, SiteSpec, Verdict

_call = struct.Struct("@9P20q").pack
"""`hp_rope_kv_write_call`."""


def rope_kv_write(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    slots: Tensor, layout: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op. Raises PlatformError for a position or slot that there is none of, ValueError for int32 ones."""
    if positions.dtype is not torch.int64 or slots.dtype is not torch.int64:
        raise ValueError("positions and slots must be int64, the CPU platform's index dtype")
    tokens, heads, dim = q.shape
    if q.stride(2) != 1 or k.stride(2) != 1 or v.stride(2) != 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    q_token, q_head, _ = q.stride()
    k_token, k_head, _ = k.stride()
    v_token, v_head, _ = v.stride()
    if layout == "NHD":
        num_blocks, block_size, kv_heads, _ = k_cache.shape
        k_strides, v_strides = k_cache.stride()[:3], v_cache.stride()[:3]
    else:
        num_blocks, kv_heads, block_size, _ = k_cache.shape
        k_block, k_side, k_next, _ = k_cache.stride()
        v_block, v_side, v_next, _ = v_cache.stride()
        k_strides, v_strides = (k_block, k_next, k_side), (v_block, v_next, v_side)
    cos_sin, positions, slots = cos_sin.contiguous(), positions.contiguous(), slots.contiguous()
    out = torch.empty((tokens, heads, dim))
    call("hp_rope_kv_write", _call(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), cos_sin.data_ptr(), positions.data_ptr(), slots.data_ptr(),
        out.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        tokens, heads, kv_heads, dim, cos_sin.shape[1], cos_sin.shape[0],
        q_token, q_head, k_token, k_head, v_token, v_head,
        *k_strides, *v_strides, num_blocks, block_size,
    ))  # fmt: skip
    return out, k_cache, v_cache


def _check(spec: SiteSpec) -> Verdict:
    if spec.dtype != "float32" or spec["kv_dtype"] != "float32":
        return Verdict(False, f"rotates and stores float32, not {spec.dtype} as {spec['kv_dtype']}")
    reason = refusal()
    return Verdict(reason is None, reason or "")


KERNELS = (Impl("rope_kv_write", "cpu.native", rope_kv_write, check=_check, rank=10),)
