"""Paged attention by the native library (`src/attention.h`): one call of it a layer, caches read where they lie.

Lengths are read from the step's tensors, which are on the host here, so that steps of static shape are served too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from hotplug.platforms.cpu.native.library import call, refusal
from hotplug.vendor import AttentionInputs, Impl, SiteSpec, Verdict

MAX_HEAD_DIM = 256

_CACHE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CACHE_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in _CACHE_KINDS)

_call = struct.Struct("@8P19q2d").pack
"""`hp_attention_call`. Packing it whole takes a third of the time of as many arguments through ctypes."""


def attention(spec: SiteSpec) -> Callable[[Tensor, Tensor, Tensor, AttentionInputs, Tensor | None], Tensor]:
    """The op, for `q` in float32. Raises PlatformError for a step that points outside its cache, ValueError for int32
    block tables. Rows of no request are zero.
    """
    by_token = spec["layout"] == "NHD"
    window, scale, soft_cap = spec["window"] or 0, spec["scale"], spec["soft_cap"] or 0.0

    def run(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, sinks: Tensor | None) -> Tensor:
        table, starts, lens = step.block_table, step.query_start, step.seq_lens
        if table.dtype is not torch.int64 or starts.dtype is not torch.int64 or lens.dtype is not torch.int64:
            raise ValueError("block tables, query starts and lengths must be int64, the CPU platform's index dtype")
        tokens, heads, dim = q.shape
        q_token, q_head, q_step = q.stride()
        if q_step != 1:
            q = q.contiguous()
            q_token, q_head, _ = q.stride()
        if by_token:
            num_blocks, block_size, kv_heads, _ = k_cache.shape
            k_block, k_token, k_head, _ = k_cache.stride()
            v_block, v_token, v_head, _ = v_cache.stride()
        else:
            num_blocks, kv_heads, block_size, _ = k_cache.shape
            k_block, k_head, k_token, _ = k_cache.stride()
            v_block, v_head, v_token, _ = v_cache.stride()
        if sinks is not None:
            sinks = sinks.to(torch.float32).contiguous()
        out = torch.empty((tokens, heads, dim))
        call("hp_attention", _call(
            q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(),
            table.data_ptr(), starts.data_ptr(), lens.data_ptr(), 0 if sinks is None else sinks.data_ptr(),
            tokens, q_token, q_head,
            k_block, k_token, k_head, v_block, v_token, v_head,
            table.stride(0), table.shape[1], len(lens),
            heads, kv_heads, dim, num_blocks, block_size,
            _CACHE_KINDS[k_cache.dtype], window, scale, soft_cap,
        ))  # fmt: skip
        return out

    return run


def _check(spec: SiteSpec) -> Verdict:
    if spec.dtype != "float32":
        return Verdict(False, f"takes queries in float32, not {spec.dtype}")
    if spec["kv_dtype"] not in _CACHE_DTYPES:
        return Verdict(False, f"reads caches in {', '.join(_CACHE_DTYPES)}, not {spec['kv_dtype']}")
    if spec["head_dim"] % 8 or spec["head_dim"] > MAX_HEAD_DIM:
        return Verdict(False, f"takes heads of multiples of 8 up to {MAX_HEAD_DIM}, not {spec['head_dim']}")
    reason = refusal()
    return Verdict(reason is None, reason or "")


KERNELS = (Impl("attention", "cpu.native", make=attention, check=_check, rank=20),)
