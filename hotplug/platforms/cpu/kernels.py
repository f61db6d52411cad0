"""CPU kernels on top of PyTorch: attention over gathered blocks with its fused kernel, lean small ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hotplug.vendor import AttentionInputs, Impl, SiteSpec, Verdict, gather_kv


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, scale: float, window: int | None, layout: str
) -> Tensor:
    """Decodes as one padded batch, prompt chunks one request at a time, through PyTorch's fused attention."""
    out = torch.empty_like(q)
    decodes = step.num_decodes
    if decodes:
        out[:decodes] = _decode(q[:decodes], k_cache, v_cache, step, scale, window)
    begin = decodes
    for i in range(decodes, len(step.query_lens_host)):
        query_len, seq_len = step.query_lens_host[i], step.seq_lens_host[i]
        k, v = gather_kv(k_cache, v_cache, step.block_table[i], seq_len, layout)
        out[begin : begin + query_len] = _prefill(q[begin : begin + query_len], k, v, scale, window)
        begin += query_len
    return out


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, scale: float, window: int | None
) -> Tensor:
    """q [requests, heads, head_dim], one query each."""
    requests = q.shape[0]
    block_size = k_cache.shape[1]
    longest = max(step.seq_lens_host[:requests])
    table = step.block_table[:requests, : -(-longest // block_size)]
    k = k_cache[table].flatten(1, 2).transpose(1, 2).to(q.dtype)  # [requests, kv_heads, context, head_dim]
    v = v_cache[table].flatten(1, 2).transpose(1, 2).to(q.dtype)
    context = torch.arange(k.shape[2])
    lens = step.seq_lens[:requests].unsqueeze(1)
    visible = context < lens
    if window is not None:
        visible &= context >= lens - window
    # Grouped heads become extra queries of their key/value head, so keys are read once a group.
    grouped = q.unflatten(1, (k.shape[1], -1))
    mixed = F.scaled_dot_product_attention(grouped, k, v, attn_mask=visible[:, None, None, :], scale=scale)
    return mixed.flatten(1, 2)


def _prefill(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """The last len(q) positions of one sequence over all of it."""
    query_len, seq_len = q.shape[0], k.shape[0]
    heads = q.transpose(0, 1).unsqueeze(0)
    keys, values = (x.to(q.dtype).transpose(0, 1).unsqueeze(0) for x in (k, v))
    if query_len == seq_len and (window is None or window >= seq_len):
        mixed = F.scaled_dot_product_attention(heads, keys, values, is_causal=True, scale=scale, enable_gqa=True)
    else:
        key = torch.arange(seq_len)
        query = torch.arange(seq_len - query_len, seq_len).unsqueeze(1)
        visible = key <= query
        if window is not None:
            visible &= key > query - window
        mixed = F.scaled_dot_product_attention(heads, keys, values, attn_mask=visible, scale=scale, enable_gqa=True)
    return mixed.squeeze(0).transpose(0, 1)


def _token_major(spec: SiteSpec) -> Verdict:
    if spec["layout"] != "NHD":
        return Verdict(False, f"layout {spec['layout']} is not NHD")
    return Verdict(True)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """PyTorch's fused normalization."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


KERNELS = (
    Impl("attention", "cpu.sdpa", attention, check=_token_major, rank=10),
    Impl("rms_norm", "cpu.fused", rms_norm, rank=10),
)
