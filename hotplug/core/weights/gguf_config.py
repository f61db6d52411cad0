"""GGUF metadata -> ModelConfig, for the architectures llama (Mistral ships as it too), qwen2 and qwen3."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hotplug.core.errors import UnsupportedModelError, WeightsError
from hotplug.core.weights.config import ModelConfig, RopeConfig
from hotplug.core.weights.gguf_file import GgufFile, Strings

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_FILE_TYPE_DTYPES = {0: "float32", 1: "float16", 32: "bfloat16"}
"""`general.file_type`; a quantized file dequantizes to float32."""

_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


class _Metadata:
    """Typed look-ups of one architecture's keys, with errors that name file and key."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.where = str(file.path)
        self._values, self._prefix = file.metadata, architecture + "."

    def has(self, key: str) -> bool:
        return self._prefix + key in self._values

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, np.ndarray):  # one value a layer
            if value.size == 0 or (value != value[0]).any():
                raise UnsupportedModelError(f"{self._prefix}{key} differs by layer", where=self.where)
            value = value[0].item()
        if not isinstance(value, int) or value < 0:
            raise WeightsError(f"{self._prefix}{key} is {value!r}, not a size", where=self.where)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise WeightsError(f"{self._prefix}{key} is {value!r}, not a number", where=self.where)
        return float(value)

    def text(self, key: str, default: str) -> str:
        return str(self._get(key, default))

    def _get(self, key: str, default: Any) -> Any:
        value = self._values.get(self._prefix + key, default)
        if value is None:
            raise WeightsError(f"the metadata lacks {self._prefix}{key}", where=self.where)
        return value


def gguf_config(file: GgufFile) -> ModelConfig:
    """The ModelConfig a GGUF file describes. Raises WeightsError and UnsupportedModelError."""
    where = str(file.path)
    name = str(file.metadata.get("general.architecture", ""))
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"the GGUF architecture {name!r} is not built", where=where,
            hint=f"Built: {', '.join(ARCHITECTURES)}.",
        )  # fmt: skip
    meta = _Metadata(file, name)
    if meta.has("expert_count") and meta.integer("expert_count") > 0:
        raise UnsupportedModelError("mixture-of-experts models are not read from GGUF", where=where,
                                    hint="Use a safetensors checkpoint.")  # fmt: skip
    hidden, heads = meta.integer("embedding_length"), meta.integer("attention.head_count")
    if not heads or not hidden or "token_embd.weight" not in file.tensors:
        raise WeightsError("it holds no language model (no embedding or no attention heads)", where=where)
    head_dim = meta.integer("attention.key_length", hidden // heads)
    _check_head(meta, head_dim)
    num_layers = meta.integer("block_count")
    window = meta.integer("attention.sliding_window", 0) or None
    rope = _rope(file, meta, head_dim)
    return ModelConfig(
        architecture="MistralForCausalLM" if name == "llama" and window else ARCHITECTURES[name],
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=meta.integer("feed_forward_length"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=meta.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position=_max_position(meta, rope),
        rms_norm_eps=meta.number("attention.layer_norm_rms_epsilon"),
        rope=rope,
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        sliding_window=window,
        sliding_layers=frozenset(range(num_layers)) if window else frozenset(),
        dtype=_FILE_TYPE_DTYPES.get(file.metadata.get("general.file_type", 0), "float32"),
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=end_token_ids(file),
        raw={k: v for k, v in file.metadata.items() if not isinstance(v, list | Strings | np.ndarray)},
    )


def end_token_ids(file: GgufFile) -> tuple[int, ...]:
    """Tokens that end a turn, in the metadata's own order of importance, without repetition."""
    found = (file.metadata.get(f"tokenizer.ggml.{key}") for key in _END_KEYS)
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


def _check_head(meta: _Metadata, head_dim: int) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        size = meta.integer(key, head_dim)
        if size != head_dim:
            raise UnsupportedModelError(
                f"{key} {size} that differs from the head size {head_dim} is not built", where=meta.where
            )


def _rope(file: GgufFile, meta: _Metadata, head_dim: int) -> RopeConfig:
    theta = meta.number("rope.freq_base", 10000.0)
    kind = meta.text("rope.scaling.type", "linear" if meta.has("rope.scale_linear") else "none")
    if "rope_factors_long.weight" in file.tensors or "rope_factors_short.weight" in file.tensors:
        kind = "longrope"
    factors = _freq_factors(file, head_dim)
    if kind == "none":
        return RopeConfig(theta=theta, freq_factors=factors)
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0))
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear" if factor != 1.0 else "default", factor=factor,
                          freq_factors=factors)  # fmt: skip
    if kind != "yarn":
        raise UnsupportedModelError(f"rope scaling {kind!r} is not built", where=meta.where,
                                    hint="Built: none, linear, yarn.")  # fmt: skip
    stretch = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_position=meta.integer("rope.scaling.original_context_length",
                                           meta.integer("context_length")),
        beta_fast=meta.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=meta.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=meta.number("rope.scaling.attn_factor", 1.0) * stretch,
        freq_factors=factors,
    )  # fmt: skip


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
    return tuple(file.raw(tensor).reshape(-1).view("<f4").tolist())


def _max_position(meta: _Metadata, rope: RopeConfig) -> int:
    length = meta.integer("context_length")
    return max(length, int(rope.original_max_position * rope.factor)) if rope.kind == "yarn" else length
