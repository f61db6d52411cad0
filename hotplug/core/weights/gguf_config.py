"""GGUF metadata -> ModelConfig, for the architectures llama (Mistral ships as it too), qwen2 and qwen3."""

from __future__ import annotations

import math

import numpy as np

from hotplug.core.errors import UnsupportedModelError, WeightsError
from hotplug.core.weights.config import ModelConfig, RopeConfig
from hotplug.core.weights.gguf_file import GgufFile, Strings
from hotplug.core.weights.limits import (
    EPS,
    FACTOR,
    MOST_EXPERTS,
    MOST_HEADS,
    MOST_LAYERS,
    MOST_POSITIONS,
    MOST_WIDTH,
    SCALE,
    THETA,
)
from hotplug.core.weights.metadata import Metadata
from hotplug.core.weights.token_ids import Named, known_tokens, warn_of_unknown_tokens

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_FILE_TYPE_DTYPES = {0: "float32", 1: "float16", 32: "bfloat16"}
"""`general.file_type`; a quantized file dequantizes to float32."""

_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def gguf_config(file: GgufFile) -> ModelConfig:
    """The ModelConfig a GGUF file describes. Raises WeightsError and UnsupportedModelError."""
    where = str(file.path)
    name = file.metadata.text("general.architecture", "", most=100)
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"the GGUF architecture {name!r} is not built", where=where,
            hint=f"Built: {', '.join(ARCHITECTURES)}.",
        )  # fmt: skip
    meta = Metadata(file.values, where, prefix=f"{name}.", error=WeightsError)
    if meta.by_layer("expert_count", 0, MOST_EXPERTS, 0) > 0:
        raise UnsupportedModelError("mixture-of-experts models are not read from GGUF", where=where,
                                    hint="Use a safetensors checkpoint.")  # fmt: skip
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise WeightsError("it holds no language model (no embedding)", where=where)
    hidden = meta.by_layer("embedding_length", 1, MOST_WIDTH)
    heads = meta.by_layer("attention.head_count", 1, MOST_HEADS)
    kv_heads = meta.by_layer("attention.head_count_kv", 1, MOST_HEADS, heads)
    head_dim = meta.by_layer("attention.key_length", 2, MOST_WIDTH, hidden // heads)
    _check_heads(meta, heads, kv_heads, head_dim)
    num_layers = meta.integer("block_count", 1, MOST_LAYERS)
    window = meta.by_layer("attention.sliding_window", 0, MOST_POSITIONS, 0) or None
    rope = _rope(file, meta, head_dim)
    vocab_size = _vocab_size(file, table.shape[0])
    warn_of_unknown_tokens(_named(file, "bos_token_id", *_END_KEYS), vocab_size)
    return ModelConfig(
        architecture="MistralForCausalLM" if name == "llama" and window else ARCHITECTURES[name],
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=meta.by_layer("feed_forward_length", 1, MOST_WIDTH),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=_max_position(meta, rope),
        rms_norm_eps=meta.number("attention.layer_norm_rms_epsilon", *EPS),
        rope=rope,
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        sliding_window=window,
        sliding_layers=frozenset(range(num_layers)) if window else frozenset(),
        dtype=_FILE_TYPE_DTYPES.get(file.metadata.integer("general.file_type", 0, 2**32 - 1, 0), "float32"),
        bos_token_id=next(iter(known_tokens(_named(file, "bos_token_id"), vocab_size)), None),
        eos_token_ids=end_token_ids(file, vocab_size),
        raw={k: v for k, v in file.values.items() if not isinstance(v, Strings | np.ndarray)},
    )  # fmt: skip


def end_token_ids(file: GgufFile, vocab_size: int) -> tuple[int, ...]:
    """Tokens that end a turn, in the metadata's own order of importance, without repetition."""
    return known_tokens(_named(file, *_END_KEYS), vocab_size)


def _named(file: GgufFile, *keys: str) -> Named:
    return [(file.metadata, f"tokenizer.ggml.{key}") for key in keys]


def _vocab_size(file: GgufFile, rows: int) -> int:
    """Rows of the embedding, of which the vocabulary may have fewer. Raises WeightsError where it has more."""
    tokens = file.values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Strings) and len(tokens) > rows:
        raise WeightsError(f"tokenizer.ggml.tokens has {len(tokens):,} entries, token_embd.weight {rows:,} rows",
                           where=str(file.path))  # fmt: skip
    return rows


def _check_heads(meta: Metadata, heads: int, kv_heads: int, head_dim: int) -> None:
    if heads % kv_heads or head_dim % 2 or head_dim < 2:
        raise WeightsError(
            f"{heads} query heads, {kv_heads} key/value heads of size {head_dim} do not fit together", where=meta.where
        )
    for key in ("attention.value_length", "rope.dimension_count"):
        size = meta.by_layer(key, 1, MOST_WIDTH, head_dim)
        if size != head_dim:
            raise UnsupportedModelError(
                f"{key} {size} that differs from the head size {head_dim} is not built", where=meta.where
            )


def _rope(file: GgufFile, meta: Metadata, head_dim: int) -> RopeConfig:
    """As llama.cpp reads it: a factor without a type is linear, a linear factor of 0 is none."""
    theta = meta.number("rope.freq_base", *THETA, 10000.0)
    kind = meta.text("rope.scaling.type", "linear", most=100)
    if "rope_factors_long.weight" in file.tensors or "rope_factors_short.weight" in file.tensors:
        kind = "longrope"
    factors = _freq_factors(file, head_dim)
    if kind == "none":
        return RopeConfig(theta=theta, freq_factors=factors)
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(f"rope scaling {kind!r} is not built", where=meta.where,
                                    hint="Built: none, linear, yarn.")  # fmt: skip
    factor = _factor(meta, kind)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear" if factor != 1.0 else "default", factor=factor,
                          freq_factors=factors)  # fmt: skip
    if theta == 1.0:
        meta.refuse("rope.freq_base", "must be above 1 with yarn", theta)
    stretch = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_position=meta.integer("rope.scaling.original_context_length", 1, MOST_POSITIONS, None)
        or meta.integer("context_length", 1, MOST_POSITIONS),
        beta_fast=meta.number("rope.scaling.yarn_beta_fast", *SCALE, 32.0),
        beta_slow=meta.number("rope.scaling.yarn_beta_slow", *SCALE, 1.0),
        attention_factor=meta.number("rope.scaling.attn_factor", *SCALE, 1.0) * stretch,
        freq_factors=factors,
    )


def _factor(meta: Metadata, kind: str) -> float:
    key = "rope.scaling.factor" if meta.has("rope.scaling.factor") else "rope.scale_linear"
    if kind == "linear" and meta.number(key, 0.0, FACTOR[1], 1.0) == 0.0:
        return 1.0
    return float(meta.number(key, *FACTOR, 1.0))


def _freq_factors(file: GgufFile, head_dim: int) -> tuple[float, ...] | None:
    tensor = file.tensors.get("rope_freqs.weight")
    if tensor is None:
        return None
    if tensor.kind.name != "F32" or tensor.shape != (head_dim // 2,):
        raise WeightsError(
            f"rope_freqs.weight is {tensor.kind.name} {list(tensor.shape)}",
            where=str(file.path),
            why=f"float32 [{head_dim // 2}] is expected",
        )
    factors = file.raw(tensor).reshape(-1).view("<f4")
    if not np.isfinite(factors).all() or factors.min() < SCALE[0]:
        raise WeightsError("rope_freqs.weight must hold finite numbers above 0", where=str(file.path))
    return tuple(factors.tolist())


def _max_position(meta: Metadata, rope: RopeConfig) -> int:
    length: int = meta.integer("context_length", 1, MOST_POSITIONS)
    stretched = int(rope.original_max_position * rope.factor) if rope.kind == "yarn" else 0
    if stretched > MOST_POSITIONS:
        meta.refuse("rope.scaling.factor", f"stretches the context to {stretched:,} positions", rope.factor)
    return max(length, stretched)
