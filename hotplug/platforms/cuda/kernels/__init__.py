"""The kernels of the CUDA platform, and which call sites each may serve."""

from __future__ import annotations

from hotplug.platforms.cuda.kernels import gathered_attention
from hotplug.platforms.cuda.kernels.attention import attention, kv_write
from hotplug.platforms.cuda.kernels.dense import add_rms_norm, rms_norm, rope, silu_mul
from hotplug.platforms.cuda.kernels.linear import linear, linear_silu_mul, logits
from hotplug.platforms.cuda.kernels.rotate import qk_norm_rope_kv_write, rope_kv_write
from hotplug.vendor import Bucket, Impl, SiteSpec, Verdict

WIDEST_ROW = 16384
"""Elements of a row that one program keeps in registers."""


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
    return 0 < bucket.num_tokens <= 1


KERNELS = (
    Impl("linear", "cuda.few_rows", linear, check=_plain, accepts=_few_rows, rank=10),
    Impl("linear_silu_mul", "cuda.few_rows", linear_silu_mul, check=_plain, accepts=_few_rows, rank=10),
    Impl("logits", "cuda.few_rows", logits, check=_plain, accepts=_few_rows, rank=10),
    Impl("rope_kv_write", "cuda.triton", rope_kv_write, check=_whole_heads, rank=10),
    Impl("qk_norm_rope_kv_write", "cuda.triton", qk_norm_rope_kv_write, check=_whole_heads, rank=10),
    Impl("rms_norm", "cuda.triton", rms_norm, check=_row, rank=10),
    Impl("add_rms_norm", "cuda.triton", add_rms_norm, check=_row, rank=10),
    Impl("silu_mul", "cuda.triton", silu_mul, rank=10),
    Impl("rope", "cuda.triton", rope, rank=10),
    Impl("kv_write", "cuda.triton", kv_write, check=_cache, rank=10),
    Impl("attention", "cuda.triton", attention, check=_cache, rank=10),
    *gathered_attention.KERNELS,
)
