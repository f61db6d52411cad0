"""Paged attention over NHD caches: cache writes, and steps of decodes and prompt chunks, each by its own kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hotplug.platforms.cuda.kernels.decode_attention import decode
from hotplug.platforms.cuda.kernels.prefill_attention import prefill
from hotplug.platforms.cuda.kernels.softmax import finite_cells
from hotplug.vendor import AttentionInputs


@triton.jit
def _kv_write(k, v, k_cache, v_cache, slots, k_token, k_head, v_token, v_head, dim, width, BLOCK: tl.constexpr):
    """A program a token: its keys and values, [kv_heads, dim] each, go to consecutive cells (`finite_cells`)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    cells = tl.arange(0, BLOCK)
    mask = cells < width
    head, col = cells // dim, cells % dim
    key = tl.load(k + token * k_token + head * k_head + col, mask=mask)
    value = tl.load(v + token * v_token + head * v_head + col, mask=mask)
    key, value = finite_cells(key, value)
    tl.store(k_cache + slot * width + cells, key, mask=mask)
    tl.store(v_cache + slot * width + cells, value, mask=mask)


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Caches of the compute dtype, in place."""
    tokens, heads, dim = k.shape
    if tokens:
        _kv_write[(tokens,)](k, v, k_cache, v_cache, slots, k.stride(0), k.stride(1), v.stride(0), v.stride(1), dim,
                             heads * dim, BLOCK=triton.next_power_of_2(heads * dim), num_warps=4)  # fmt: skip
    return k_cache, v_cache


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, sinks: Tensor | None, *, scale: float,
    window: int | None, soft_cap: float | None,
) -> Tensor:  # fmt: skip
    """Decodes and prompt chunks, each by its own kernel; lengths are read on the device."""
    decodes = step.num_decodes
    padded = step.query_lens_host is None and not decodes  # a static step of chunks: tokens that are of no request
    out = (torch.zeros if padded else torch.empty)(q.shape, dtype=q.dtype, device=q.device)
    if decodes:
        decode(q[:decodes], k_cache, v_cache, step, out[:decodes], scale, window, sinks, soft_cap)
    if decodes < len(step.seq_lens):
        prefill(q, k_cache, v_cache, step, out, scale, window, sinks, soft_cap)
    return out
