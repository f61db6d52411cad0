"""Rotation and cache write, with the heads' norms or without, as one call of the native library (`src/rope.h`)."""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from hotplug.platforms.cpu.native.library import call, refusal
from hotplug.vendor import Impl, SiteSpec, Verdict

_call = struct.Struct("@11P21qd").pack
"""`hp_rope_kv_write_call`."""
_CACHE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CACHE_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in _CACHE_KINDS)
MAX_HEAD_DIM = 1024


Written = tuple[Tensor, Tensor, Tensor]
"""The rotated queries, and the caches."""


def rope_kv_write(spec: SiteSpec) -> Callable[..., Written]:
    """The op. Raises PlatformError for a position or slot that there is none of, ValueError for int32 ones."""
    layout = spec["layout"]

    def run(
        q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor,
        slots: Tensor,
    ) -> Written:  # fmt: skip
        return _run(q, k, v, None, None, 0.0, positions, cos_sin, k_cache, v_cache, slots, layout)

    return run


def qk_norm_rope_kv_write(spec: SiteSpec) -> Callable[..., Written]:
    """The op. Raises as `rope_kv_write` does."""
    eps, layout = spec["eps"], spec["layout"]

    def run(
        q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, positions: Tensor, cos_sin: Tensor,
        k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    ) -> Written:  # fmt: skip
        return _run(q, k, v, q_weight, k_weight, eps, positions, cos_sin, k_cache, v_cache, slots, layout)

    return run


def _run(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
    positions: Tensor, cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, layout: str,
) -> Written:  # fmt: skip
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
        0 if q_weight is None else q_weight.data_ptr(), 0 if k_weight is None else k_weight.data_ptr(),
        out.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        tokens, heads, kv_heads, dim, cos_sin.shape[1], cos_sin.shape[0],
        q_token, q_head, k_token, k_head, v_token, v_head,
        *k_strides, *v_strides, num_blocks, block_size, _CACHE_KINDS[k_cache.dtype], eps,
    ))  # fmt: skip
    return out, k_cache, v_cache


def _check(spec: SiteSpec) -> Verdict:
    if spec.dtype != "float32" or spec["kv_dtype"] not in _CACHE_DTYPES:
        return Verdict(
            False, f"rotates float32 into {', '.join(_CACHE_DTYPES)}, not {spec.dtype} into {spec['kv_dtype']}"
        )
    if spec["head_dim"] > MAX_HEAD_DIM:
        return Verdict(False, f"takes heads up to {MAX_HEAD_DIM}, not {spec['head_dim']}")
    reason = refusal()
    return Verdict(reason is None, reason or "")


KERNELS = (
    Impl("rope_kv_write", "cpu.native", make=rope_kv_write, check=_check, rank=10),
    Impl("qk_norm_rope_kv_write", "cpu.native", make=qk_norm_rope_kv_write, check=_check, rank=10),
)
