"""Prompt chunks by a library's attention over keys and values gathered from the cache, decodes by the Triton kernel.

Libraries for Hopper reach the tensor cores' rate on contiguous keys. Gathering costs each key once a layer, which long
chunks repay; short ones, steps without lengths on the host and contexts too long to copy go to the Triton kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hotplug.platforms.cuda.kernels.attention import attention as paged_attention
from hotplug.platforms.cuda.kernels.decode_attention import decode
from hotplug.platforms.cuda.kernels.made import made
from hotplug.vendor import AttentionInputs, Bucket, Impl, SiteSpec, Verdict

STATIC = ("scale", "window", "soft_cap")
"""Facts of a call site that attention is made with."""
LEAST_QUERIES = 256
"""Queries that a gathered key must meet on average: copying it then costs less than the library saves."""
MOST_TOKENS = 1 << 17
"""Keys gathered at once: half a GiB for 8 heads of 128 in bfloat16."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """The prompt chunks of a step, made once for all its layers. int32 on the device but for the slots."""

    slots: Tensor
    """[keys] cells of the cache that hold the chunks' keys, request after request."""
    query_start: Tensor
    """[chunks + 1] first query of each chunk, from the first chunk's on."""
    key_start: Tensor
    """[chunks + 1] first of each chunk's keys among the gathered ones."""
    max_query_len: int
    max_seq_len: int


Attend = Callable[[Tensor, Tensor, Tensor, Chunks, float, int | None, float | None], Tensor]
"""(q [queries, heads, dim], k, v [keys, kv_heads, dim], chunks, scale, window, soft_cap) -> like q."""


def chunks_of(step: AttentionInputs, block_size: int, window: int | None) -> Chunks | None:
    """The chunks to gather; None where the Triton kernel should read the cache itself.

    Instead of keys that no query of a chunk sees, behind its window, the first that one does is gathered: where they
    were are null entries, whose cells may hold anything, and libraries multiply values by weights of zero.
    """
    if step.query_lens_host is None or step.seq_lens_host is None:
        return None
    queries, seqs = step.query_lens_host[step.num_decodes :], step.seq_lens_host[step.num_decodes :]
    keys = sum(seqs)
    if keys > MOST_TOKENS or sum(q * s for q, s in zip(queries, seqs, strict=True)) < LEAST_QUERIES * keys:
        return None
    lens = step.seq_lens[step.num_decodes :]
    key_start = torch.zeros(len(seqs) + 1, dtype=torch.int32, device=lens.device)
    torch.cumsum(lens, 0, dtype=torch.int32, out=key_start[1:])
    # int64 from here on: a cache may have more cells than int32 counts
    request = torch.repeat_interleave(torch.arange(len(seqs), device=lens.device), lens, output_size=keys)
    position = torch.arange(keys, device=lens.device) - key_start[request]
    if window is not None:
        before = lens - step.query_start[step.num_decodes :].diff()
        position = torch.maximum(position, (before + 1 - window)[request])
    block = step.block_table[step.num_decodes :][request, position // block_size].to(torch.int64)
    start = step.query_start[step.num_decodes :]
    return Chunks(
        slots=block * block_size + position % block_size, query_start=(start - start[0]).to(torch.int32),
        key_start=key_start, max_query_len=max(queries), max_seq_len=max(seqs),
    )  # fmt: skip


def attention(
    attend: Attend, q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, sinks: Tensor | None, *,
    scale: float, window: int | None, soft_cap: float | None,
) -> Tensor:  # fmt: skip
    """Chunks by `attend` where gathering pays."""
    decodes = step.num_decodes
    chunks = None
    if decodes < len(step.seq_lens):
        chunks = step.once(chunks_of, k_cache.shape[1], window)
    if chunks is None:
        return paged_attention(q, k_cache, v_cache, step, sinks, scale=scale, window=window, soft_cap=soft_cap)
    k, v = gather(k_cache, v_cache, chunks)
    if not decodes:
        return attend(q, k, v, chunks, scale, window, soft_cap)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decode(q[:decodes], k_cache, v_cache, step, out[:decodes], scale, window, sinks, soft_cap)
    out[decodes:] = attend(q[decodes:], k, v, chunks, scale, window, soft_cap)
    return out


def gather(k_cache: Tensor, v_cache: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Keys and values of the chunks' requests, each [keys, kv_heads, head_dim]."""
    k, v = (cache.view(-1, *cache.shape[2:]).index_select(0, chunks.slots) for cache in (k_cache, v_cache))
    return k, v


@cache
def fa3_package() -> tuple[Callable[..., Any], Mapping[str, bool]]:
    """FlashAttention-3's varlen function and what its build leaves out. Raises ImportError where there is none."""
    try:
        interface, config = import_module("flash_attn_interface"), import_module("flash_attn_config")
    except ImportError:
        interface, config = import_module("fa3_fwd_interface"), import_module("fa3_fwd_config")
    return interface.flash_attn_varlen_func, config.CONFIG["build_flags"]


def _fa3(q: Tensor, k: Tensor, v: Tensor, chunks: Chunks, scale: float, window: int | None,
         soft_cap: float | None) -> Tensor:  # fmt: skip
    """FlashAttention-3 (Shah et al., 2024), of whichever of its packages is there."""
    forward, _ = fa3_package()
    out: Tensor = forward(q, k, v, chunks.query_start, chunks.key_start, chunks.max_query_len, chunks.max_seq_len,
                  softmax_scale=scale, causal=True, window_size=(-1, -1) if window is None else (window - 1, 0),
                  softcap=soft_cap or 0.0)  # fmt: skip
    return out


def _flash(q: Tensor, k: Tensor, v: Tensor, chunks: Chunks, scale: float, window: int | None,
           soft_cap: float | None) -> Tensor:  # fmt: skip
    """PyTorch's own FlashAttention-2."""
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, chunks.query_start, chunks.key_start, chunks.max_query_len, chunks.max_seq_len, 0.0, True, False,
        scale=scale, window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]  # fmt: skip
    return out


def plain(spec: SiteSpec, *, window: bool, soft_cap: bool, dtypes: tuple[str, ...]) -> Verdict:
    """What no library of attention has here, and what this one has not."""
    if spec["layout"] != "NHD" or spec["kv_dtype"] != spec.dtype:
        return Verdict(False, f"reads NHD caches of {spec.dtype}, not {spec['layout']} of {spec['kv_dtype']}")
    if spec.dtype not in dtypes:
        return Verdict(False, f"computes in {' or '.join(dtypes)}, not {spec.dtype}")
    if spec["head_dim"] > 256 or spec["head_dim"] % 8:
        return Verdict(False, f"head_dim {spec['head_dim']} is above 256 or no multiple of 8")
    if spec["sinks"]:
        return Verdict(False, "has no sinks")
    if spec["soft_cap"] is not None and not soft_cap:
        return Verdict(False, "has no soft cap")
    if spec["window"] is not None and not window:
        return Verdict(False, "has no sliding window")
    return Verdict(True)


def _check_fa3(spec: SiteSpec) -> Verdict:
    if spec.arch != "sm_90":
        return Verdict(False, f"is for sm_90, not {spec.arch}")
    try:
        _, without = fa3_package()
    except ImportError as e:
        return Verdict(False, f"no package of FlashAttention-3: {e}")
    halves = ("bfloat16",) if without["FLASHATTENTION_DISABLE_FP16"] else ("bfloat16", "float16")
    return plain(spec, window=not without["FLASHATTENTION_DISABLE_LOCAL"],
                  soft_cap=not without["FLASHATTENTION_DISABLE_SOFTCAP"], dtypes=halves)  # fmt: skip


def _check_flash(spec: SiteSpec) -> Verdict:
    if not (torch.cuda.is_available() and torch.backends.cuda.is_flash_attention_available()):
        return Verdict(False, "PyTorch sees no GPU or is built without FlashAttention")
    return plain(spec, window=True, soft_cap=False, dtypes=("bfloat16", "float16"))


def chunked(bucket: Bucket) -> bool:
    """Whether a step has prompt chunks, which libraries are for."""
    return bucket.max_query_len > 1


KERNELS = (
    Impl("attention", "cuda.fa3", make=made(partial(attention, _fa3), *STATIC), check=_check_fa3, accepts=chunked,
         rank=20),
    Impl("attention", "cuda.flash", make=made(partial(attention, _flash), *STATIC), check=_check_flash,
         accepts=chunked, rank=5),
)  # fmt: skip
