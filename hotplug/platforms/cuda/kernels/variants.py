"""The call sites whose kernels are compiled ahead of time in CI (`ci/kernels.py`): those of the models that are served.

A line an op, with its facts as the layers state them, a dtype and a step. Every kernel that claims such a site is
run with its launches recorded, so what is compiled is what the platform launches. Data only: nothing here is imported
when a model runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Lens = tuple[tuple[int, int], ...]
"""(query tokens, sequence tokens) of each request, decodes first."""

ONE: Lens = ((1, 129),)
DECODES: Lens = ((1, 1000),) * 64
CHUNKS: Lens = ((512, 512), (16, 2000))
PROMPTS: Lens = ((4096, 4096),) * 4
MIXED: Lens = (*DECODES[:8], *CHUNKS)


@dataclass(frozen=True)
class Variant:
    """One call site and step."""

    op: str
    facts: Mapping[str, Any]
    lens: Lens = DECODES
    dtype: str = "bfloat16"
    excluded: Mapping[str, str] = field(default_factory=dict)
    """Targets that this call site is not for, each with the reason; a key may be the start of a target's name."""


def _width(*widths: int) -> Sequence[dict[str, Any]]:
    return [{"width": width} for width in widths]


def _heads(heads: int, kv_heads: int, dim: int) -> dict[str, Any]:
    return {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}


def _cache(dtype: str = "bfloat16", size: int = 64) -> dict[str, Any]:
    return {"block_size": size, "layout": "NHD", "kv_dtype": dtype}


def _attention(heads: tuple[int, int, int], lens: Lens, dtype: str = "bfloat16", window: int | None = None,
               **more: Any) -> Variant:  # fmt: skip
    """Decodes alone run in captured steps, of static shape; everything else op by op."""
    alone = all(query == 1 for query, _ in lens)
    facts = {**_heads(*heads), **_cache(dtype), "scale": heads[2] ** -0.5, "window": window, "sinks": False,
             "soft_cap": None, "static": alone}  # fmt: skip
    return Variant("attention", facts, lens, dtype, **more)


LLAMA_8B, LLAMA_1B, QWEN3_30B, GEMMA, SMOLLM2 = (32, 8, 128), (32, 8, 64), (32, 4, 128), (8, 4, 256), (9, 3, 64)
QWEN3_ROUTER = {"hidden": 2048, "num_experts": 128, "top_k": 8}
EPS = {"eps": 1e-5}

LLAMA_VOCAB, QWEN3_VOCAB = 128256, 151936
SPILLS = {"gfx1100": "products of such heads spill by far"}
BUFFERS = {"gfx": "Triton 3.6 fails where it makes AMD's buffer operations of the loads; AMDGCN_USE_BUFFER_OPS=0 helps"}


def _linear(op: str, facts: Mapping[str, Any], *tokens: int) -> Sequence[Variant]:
    return [Variant(op, {**facts, "bias": False, "scheme": "none"}, DECODES[:count]) for count in tokens]


VARIANTS: tuple[Variant, ...] = (
    *(Variant(op, {**facts, **EPS}) for op in ("rms_norm", "add_rms_norm") for facts in _width(2048, 4096)),
    Variant("rms_norm", {"width": 128, **EPS}),  # of single heads
    Variant("add_rms_norm", {"width": 576, **EPS}, dtype="float32"),
    *(Variant("silu_mul", facts) for facts in _width(768, 14336)),
    Variant("rope", {**_heads(*LLAMA_8B), "rotary_dim": 128}),
    Variant("rope", {**_heads(*SMOLLM2), "rotary_dim": 64}, dtype="float32"),
    Variant("kv_write", {"num_kv_heads": 8, "head_dim": 128, **_cache()}),
    Variant("kv_write", {"num_kv_heads": 3, "head_dim": 64, **_cache("float32")}, dtype="float32"),
    Variant("block_copy", {"page_bytes": 16 * 8 * 128 * 2}),
    *(
        Variant(op, {**_heads(*heads), "rotary_dim": heads[2], **_cache(), **EPS})
        for op, heads in (
            ("rope_kv_write", LLAMA_8B),
            ("rope_kv_write", LLAMA_1B),
            ("qk_norm_rope_kv_write", QWEN3_30B),
        )
    ),
    *_linear("linear", {"in_features": 4096, "out_features": 6144}, 1, 16),
    *_linear("linear", {"in_features": 14336, "out_features": 4096}, 1),
    *_linear("linear", {"in_features": 2048, "out_features": 3072}, 1),
    *_linear("linear", {"in_features": 64, "out_features": 1}, 1),  # a size of 1 is a constant to the compiler
    *_linear("linear_silu_mul", {"in_features": 4096, "width": 14336}, 1, 16, 64),
    Variant("linear_silu_mul", {"in_features": 4096, "width": 14336, "bias": False, "scheme": "none"}, PROMPTS),
    *_linear("logits", {"hidden": 4096, "vocab": LLAMA_VOCAB}, 1, 16, 64),
    *(Variant("moe_route", {**QWEN3_ROUTER, "renormalize": lens is ONE}, lens) for lens in (ONE, DECODES)),
    *(Variant("moe_experts", {**QWEN3_ROUTER, "width": 768}, lens) for lens in (ONE, DECODES, PROMPTS)),
    Variant("moe_experts", {**QWEN3_ROUTER, "width": 768}, DECODES, "float32"),
    Variant("prepare_step", {"block_size": 64}, DECODES, "int32"),
    Variant("embed", {"vocab": LLAMA_VOCAB, "hidden": 4096}, DECODES),
    Variant("argmax", {"vocab": LLAMA_VOCAB}, DECODES, "float32", BUFFERS),
    Variant("sample_rows", {"vocab": QWEN3_VOCAB}, DECODES, "float32", BUFFERS),
    Variant("reject_sample", {}, MIXED, "int32"),
    Variant("penalties", {"vocab": LLAMA_VOCAB}, DECODES, "float32"),
    Variant("logprobs", {"vocab": LLAMA_VOCAB}, DECODES, "float32"),
    _attention(LLAMA_8B, ONE),
    _attention(LLAMA_8B, DECODES),
    _attention(LLAMA_8B, MIXED),
    _attention(LLAMA_8B, MIXED, "float16"),
    _attention(LLAMA_1B, DECODES),
    _attention(LLAMA_1B, MIXED),
    _attention(QWEN3_30B, DECODES),
    _attention(QWEN3_30B, MIXED),
    _attention(GEMMA, MIXED, window=1024, excluded=SPILLS),
    _attention(SMOLLM2, MIXED, "float32"),
)
