"""The kernels of the CUDA platform, and which call sites each may serve."""

from __future__ import annotations

from hotplug.platforms.cuda.kernels import (
    dense,
    flashinfer_attention,
    gated_hopper,
    gathered_attention,
    linear,
    prefill_hopper,
)
from hotplug.platforms.cuda.kernels.attention import attention, kv_write
from hotplug.platforms.cuda.kernels.block_copy import block_copy
from hotplug.platforms.cuda.kernels.dense import add_rms_norm, rms_norm, rope, silu_mul
from hotplug.platforms.cuda.kernels.inputs import embed, prepare_step
from hotplug.platforms.cuda.kernels.made import made
from hotplug.platforms.cuda.kernels.moe import grouped_mm, moe_experts
from hotplug.platforms.cuda.kernels.moe_route import moe_route
from hotplug.platforms.cuda.kernels.rotate import qk_norm_rope_kv_write, rope_kv_write
from hotplug.platforms.cuda.kernels.sample import argmax, sample, sample_rows
from hotplug.platforms.cuda.kernels.scores import logprobs, penalties
from hotplug.platforms.cuda.kernels.verify import reject_sample
from hotplug.vendor import Bucket, Impl, SiteSpec, Verdict

WIDEST_ROW = 16384
"""Elements of a row that one program keeps in registers."""

MOST_EXPERTS = 1024
"""Experts that one program keeps in registers."""
GROUPED_MM_RANK = 5
"""Of PyTorch's grouped product for many tokens: above 10 it goes before ours, below it has to be forced."""
GROUPED_MM_TOKENS = 1024
GATED_TOKENS = 1024
"""Below them tiles do not fill the rounds of the multiprocessors well, and cuBLAS has smaller ones."""


def _row(spec: SiteSpec) -> Verdict:
    width = spec["width"]
    return Verdict(width <= WIDEST_ROW, "" if width <= WIDEST_ROW else f"width {width} is above {WIDEST_ROW}")


def _cache(spec: SiteSpec) -> Verdict:
    if spec["layout"] != "NHD":
        return Verdict(False, f"layout {spec['layout']} is not NHD")
    if spec["kv_dtype"] != spec.dtype:
        return Verdict(False, f"KV dtype {spec['kv_dtype']} is not the compute dtype {spec.dtype}")
    if spec["head_dim"] > 256:
        return Verdict(False, f"head_dim {spec['head_dim']} is above 256")
    return Verdict(True)


def _whole_heads(spec: SiteSpec) -> Verdict:
    if spec["rotary_dim"] != spec["head_dim"]:
        return Verdict(False, f"rotates whole heads, not {spec['rotary_dim']} of {spec['head_dim']} dimensions")
    return _cache(spec)


def _plain(spec: SiteSpec) -> Verdict:
    if spec["scheme"] != "none":
        return Verdict(False, f"reads plain weights, not {spec['scheme']}")
    return Verdict(True)


def _few_rows(bucket: Bucket) -> bool:
    return 0 < bucket.num_tokens <= linear.MOST_ROWS


def _gates_on_hopper(spec: SiteSpec) -> Verdict:
    if spec.arch != "sm_90":
        return Verdict(False, f"is for sm_90, not {spec.arch}")
    if spec.dtype != "bfloat16" or spec["scheme"] != "none":
        return Verdict(False, f"reads plain weights in bfloat16, not {spec['scheme']} ones in {spec.dtype}")
    if spec["width"] % 128 or spec["in_features"] % 8 or spec["in_features"] < 256:
        return Verdict(False, f"takes widths of whole 128s and inputs of whole 8s from 256 on, not {spec['width']} and "
                              f"{spec['in_features']}")  # fmt: skip
    return Verdict(True)


def _many_rows(bucket: Bucket) -> bool:
    return bucket.num_tokens >= GATED_TOKENS


def _experts(spec: SiteSpec) -> Verdict:
    if spec["num_experts"] > MOST_EXPERTS:
        return Verdict(False, f"{spec['num_experts']} experts are above {MOST_EXPERTS}")
    return Verdict(True)


def _grouped_mm(spec: SiteSpec) -> Verdict:
    if spec.dtype != "bfloat16":
        return Verdict(False, f"PyTorch's grouped product takes bfloat16, not {spec.dtype}")
    if spec["hidden"] % 8 or spec["width"] % 8:
        return Verdict(False, f"rows of {spec['hidden']} and {spec['width']} elements are not multiples of 16 bytes")
    return _experts(spec)


def _many_tokens(bucket: Bucket) -> bool:
    return bucket.num_tokens >= GROUPED_MM_TOKENS


KERNELS = (
    Impl("linear", "cuda.few_rows", make=made(linear.linear), check=_plain, accepts=_few_rows, rank=10),
    Impl("linear", "cuda.cublas", make=made(linear.library), check=_plain, rank=5),
    Impl("linear_silu_mul", "cuda.few_rows", make=made(linear.linear_silu_mul), check=_plain, accepts=_few_rows,
         rank=10),
    Impl("linear_silu_mul", "cuda.hopper", make=made(gated_hopper.gated), check=_gates_on_hopper, accepts=_many_rows,
         rank=20),
    Impl("logits", "cuda.wide", make=made(linear.logits), check=_plain, rank=10),
    Impl("rope_kv_write", "cuda.triton", make=made(rope_kv_write), check=_whole_heads, rank=10),
    Impl("qk_norm_rope_kv_write", "cuda.triton", make=made(qk_norm_rope_kv_write, "eps"), check=_whole_heads, rank=10),
    Impl("rms_norm", "cuda.triton", make=made(rms_norm, "eps"), check=_row, rank=10),
    Impl("add_rms_norm", "cuda.triton", make=made(add_rms_norm, "eps"), check=_row, rank=10),
    Impl("silu_mul", "cuda.triton", make=made(silu_mul), rank=10),
    Impl("rope", "cuda.triton", make=made(rope), rank=10),
    Impl("kv_write", "cuda.triton", make=made(kv_write), check=_cache, rank=10),
    Impl("block_copy", "cuda.triton", make=made(block_copy), rank=10),
    Impl("attention", "cuda.triton", make=made(attention, "scale", "window", "soft_cap"), check=_cache, rank=10),
    *gathered_attention.KERNELS,
    *flashinfer_attention.KERNELS,
    *prefill_hopper.KERNELS,
    Impl("embed", "cuda.triton", make=made(embed), rank=10),
    Impl("prepare_step", "cuda.triton", make=made(prepare_step, "block_size"), rank=10),
    Impl("argmax", "cuda.triton", make=made(argmax), rank=10),
    Impl("sample", "cuda.triton", make=made(sample), rank=10),
    Impl("sample_rows", "cuda.triton", make=made(sample_rows), rank=10),
    Impl("reject_sample", "cuda.triton", make=made(reject_sample), rank=10),
    Impl("penalties", "cuda.triton", make=made(penalties), rank=10),
    Impl("logprobs", "cuda.triton", make=made(logprobs), rank=10),
    Impl("moe_route", "cuda.triton", make=made(moe_route, "top_k", "renormalize"), check=_experts, rank=10),
    Impl("moe_experts", "cuda.triton", make=made(moe_experts), check=_experts, rank=10),
    Impl("moe_experts", "cuda.grouped_mm", make=made(grouped_mm), check=_grouped_mm, accepts=_many_tokens,
         rank=GROUPED_MM_RANK),
)  # fmt: skip

TUNABLES = (*dense.TUNABLES, *linear.TUNABLES)
"""What `hotplug tune` may measure."""
