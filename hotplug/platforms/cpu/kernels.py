"""CPU kernels: attention over gathered blocks and lean small ops on top of PyTorch, products of few rows in C++."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hotplug.platforms.cpu.capture import opaque
from hotplug.platforms.cpu.native.attention import KERNELS as ATTENTION_KERNELS
from hotplug.platforms.cpu.native.dense import KERNELS as DENSE_KERNELS
from hotplug.platforms.cpu.native.inputs import KERNELS as INPUTS_KERNELS
from hotplug.platforms.cpu.native.library import refusal
from hotplug.platforms.cpu.native.linear import linear_float32
from hotplug.platforms.cpu.native.norm import KERNELS as NORM_KERNELS
from hotplug.platforms.cpu.native.packed import KERNELS as PACKED_KERNELS
from hotplug.platforms.cpu.native.rope import KERNELS as ROPE_KERNELS
from hotplug.platforms.cpu.native.sampling import KERNELS as SAMPLING_KERNELS
from hotplug.vendor import AttentionInputs, Bucket, Impl, SiteSpec, Verdict, gather_kv

FEW_ROWS = 16
"""Up to so many rows a product is bound by reading its weight."""


@dataclass(slots=True)
class _DecodeState:
    """What all layers of a step share of its decodes."""

    blocks: Tensor
    """[requests * blocks] ids, padded to the longest request."""
    visible: Tensor | None
    """[requests, 1, 1, context] which positions each query sees; None where one request sees all of them."""
    hidden: Tensor | None
    """[requests, context, 1, 1] the others."""


def attention(spec: SiteSpec) -> Callable[[Tensor, Tensor, Tensor, AttentionInputs, None], Tensor]:
    """Decodes as one padded batch, prompt chunks one request at a time, through PyTorch's fused attention."""
    return opaque(partial(_attention, scale=spec["scale"], window=spec["window"]))


def _attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, sinks: None, scale: float, window: int | None
) -> Tensor:
    if step.seq_lens_host is None:  # of static shape: prepared anew, since what it holds changes
        lens = step.seq_lens.tolist()
        step = dataclasses.replace(step, query_lens_host=step.query_start.diff().tolist(), seq_lens_host=lens)
    decodes = step.num_decodes
    if not q.shape[0]:
        return torch.empty_like(q)
    if decodes == q.shape[0]:
        return _decode(q, k_cache, v_cache, step, scale, window)
    out = torch.empty_like(q)
    if decodes:
        out[:decodes] = _decode(q[:decodes], k_cache, v_cache, step, scale, window)
    begin = decodes
    for i in range(decodes, len(step.query_lens_host)):
        query_len, seq_len = step.query_lens_host[i], step.seq_lens_host[i]
        k, v = gather_kv(k_cache, v_cache, step.block_table[i], seq_len, "NHD")
        out[begin : begin + query_len] = _prefill(q[begin : begin + query_len], k, v, scale, window)
        begin += query_len
    return out


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, scale: float, window: int | None
) -> Tensor:
    """q [requests, heads, head_dim], one query each."""
    requests, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    state = step.once(_decode_state, requests, block_size, window)
    # index_select copies whole blocks; advanced indexing would go element by element
    k, v = (
        cache.index_select(0, state.blocks).view(requests, -1, kv_heads, head_dim).to(q.dtype)
        for cache in (k_cache, v_cache)
    )
    if state.hidden is not None:  # PyTorch adds -inf to what is masked and multiplies it by zero: NaN would stay
        k.masked_fill_(state.hidden, 0.0)
        v.masked_fill_(state.hidden, 0.0)
    if state.visible is None:
        k, v = k[:, : step.seq_lens_host[0]], v[:, : step.seq_lens_host[0]]
    # Grouped heads become extra queries of their key/value head, so keys are read once a group.
    grouped = q.view(requests, kv_heads, heads // kv_heads, head_dim)
    mixed = F.scaled_dot_product_attention(
        grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=state.visible, scale=scale
    )
    return mixed.reshape(requests, heads, head_dim)


def _decode_state(step: AttentionInputs, requests: int, block_size: int, window: int | None) -> _DecodeState:
    longest = max(step.seq_lens_host[:requests])
    num_blocks = -(-longest // block_size)
    blocks = step.block_table[:requests, :num_blocks].flatten()
    if requests == 1 and (window is None or window >= longest):
        return _DecodeState(blocks, None, None)
    context = torch.arange(num_blocks * block_size)
    lens = step.seq_lens[:requests].unsqueeze(1)
    visible = context < lens
    if window is not None:
        visible &= context >= lens - window
    return _DecodeState(blocks, visible[:, None, None, :], ~visible[:, :, None, None])


def _prefill(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """The last len(q) positions of one sequence over all of it."""
    query_len, seq_len = q.shape[0], k.shape[0]
    behind = 0 if window is None else max(seq_len - query_len + 1 - window, 0)
    k, v = k[behind:], v[behind:]  # before it may be null entries
    causal = query_len == seq_len and (window is None or window >= seq_len)
    heads, keys, values = (x.to(q.dtype).transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    finite = math.isfinite(float(k.sum(dtype=torch.float32)))
    if causal and finite:
        mixed = F.scaled_dot_product_attention(heads, keys, values, is_causal=True, scale=scale, enable_gqa=True)
    else:
        key = torch.arange(behind, seq_len)
        query = torch.arange(seq_len - query_len, seq_len).unsqueeze(1)
        visible = key <= query
        if window is not None:
            visible &= key > query - window
        attend = _attend_masked if finite else _attend_selected
        mixed = attend(heads, keys, values, visible, scale)
    return mixed.squeeze(0).transpose(0, 1)


def _attend_masked(heads: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """PyTorch's attention, which adds -inf to the scores that are not `visible`: NaN among them would stay NaN."""
    return F.scaled_dot_product_attention(heads, keys, values, attn_mask=visible, scale=scale, enable_gqa=True)


def _attend_selected(heads: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """The same where keys hold NaN or infinities, which queries that do not see them are to be free of."""
    group = heads.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    scores = (heads.to(torch.float32) @ keys.to(torch.float32).transpose(-1, -2)) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ values.to(torch.float32)).to(heads.dtype)


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """One copy for the keys and one for the values: a token's heads lie together in this layout."""
    k, v = k + (v - v), v.nan_to_num(0.0, 0.0, 0.0)  # `finite_values` in few passes: inf - inf is NaN, else 0
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slots, k)
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slots, v)
    return k_cache, v_cache


def rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys rotated together, in as few passes as PyTorch allows."""
    heads = q.shape[1]
    half = cos_sin.shape[-1] // 2
    table = cos_sin.index_select(0, positions).unsqueeze(1)
    cos, sin = table[..., :half], table[..., half:]
    both = torch.cat((q, k), dim=1)
    first, second = both[..., :half], both[..., half:]
    rotated = torch.cat(
        (torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)), dim=-1
    )
    return rotated[:, :heads], rotated[:, heads:]


def rms_norm(spec: SiteSpec) -> Callable[[Tensor, Tensor], Tensor]:
    """PyTorch's own normalization."""
    shape, eps = (spec["width"],), spec["eps"]
    return lambda x, weight: F.rms_norm(x, shape, weight, eps)


@opaque
def moe_experts(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each expert over the tokens that chose it, and no others."""
    top_k, flat = experts.shape[1], experts.flatten()
    by_expert = flat.argsort(stable=True)
    share = weights.flatten()
    total = torch.zeros(x.shape, dtype=torch.float32)
    counts = torch.bincount(flat, minlength=gate_up.shape[0]).tolist()
    for expert, mine in enumerate(by_expert.split(counts)):
        if len(mine):
            token = mine // top_k
            gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
            mixed = F.linear(F.silu(gate) * up, down[expert])
            total.index_add_(0, token, mixed * share[mine].unsqueeze(1))
    return total.to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A float32 weight read at memory speed, which PyTorch's product of few rows is short of below AVX-512."""
    return linear_float32(x if x.stride(-1) == 1 else x.contiguous(), weight, bias)


def _token_major(spec: SiteSpec) -> Verdict:
    if spec["layout"] != "NHD":
        return Verdict(False, f"layout {spec['layout']} is not NHD")
    return Verdict(True)


def _plain(spec: SiteSpec) -> Verdict:
    if spec["sinks"] or spec["soft_cap"] is not None:
        return Verdict(False, "PyTorch's attention has no sinks and no soft cap")
    return _token_major(spec)


def _same_dtype(spec: SiteSpec) -> Verdict:
    if spec["kv_dtype"] != spec.dtype:
        return Verdict(False, f"stores {spec.dtype} unchanged, not as {spec['kv_dtype']}")
    return _token_major(spec)


def _whole_float32(spec: SiteSpec) -> Verdict:
    if spec.dtype != "float32":
        return Verdict(False, f"rotates in float32, not {spec.dtype}")
    if spec["rotary_dim"] != spec["head_dim"]:
        return Verdict(False, f"rotates whole heads, not {spec['rotary_dim']} of {spec['head_dim']} dimensions")
    return Verdict(True)


def _native_float32(spec: SiteSpec) -> Verdict:
    if spec.dtype != "float32" or spec["scheme"] != "none":
        return Verdict(False, f"reads plain weights in float32, not {spec['scheme']} ones in {spec.dtype}")
    if reason := refusal():
        return Verdict(False, reason)
    if spec.arch != "avx2":
        return Verdict(False, f"is for processors with AVX2: PyTorch's product reads as fast with {spec.arch}")
    return Verdict(True)


def _few_rows(bucket: Bucket) -> bool:
    return bucket.num_tokens <= FEW_ROWS


KERNELS = (
    Impl("attention", "cpu.sdpa", make=attention, check=_plain, rank=10),
    Impl("kv_write", "cpu.index_copy", make=lambda _: kv_write, check=_same_dtype, rank=10),
    Impl("rope", "cpu.joint", make=lambda _: rope, check=_whole_float32, rank=10),
    Impl("rms_norm", "cpu.fused", make=rms_norm, rank=10),
    Impl("moe_experts", "cpu.by_expert", make=lambda _: moe_experts, rank=10),
    Impl("linear", "cpu.native", make=lambda _: linear, check=_native_float32, accepts=_few_rows, rank=10),
    Impl("logits", "cpu.native", make=lambda _: linear, check=_native_float32, accepts=_few_rows, rank=10),
    *ATTENTION_KERNELS,
    *DENSE_KERNELS,
    *INPUTS_KERNELS,
    *NORM_KERNELS,
    *ROPE_KERNELS,
    *SAMPLING_KERNELS,
    *PACKED_KERNELS,
)
