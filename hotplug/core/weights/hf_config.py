"""config.json -> ModelConfig, in the spellings of transformers 4 and 5.

Only what the built models honour is read; a setting that would change the result and is not built is refused
by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hotplug.core.errors import ModelError, UnsupportedModelError
from hotplug.core.weights.config import ModelConfig, RopeConfig

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
_QWEN = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
_DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = {"silu": "silu", "swish": "silu"}
"""config.json's `hidden_act` -> `ModelConfig.activation`."""
_DEFAULT_WINDOW = 4096
"""What transformers takes where the config.json of Mistral or Qwen3-MoE says nothing; null means full attention."""


ConfigReader = Callable[[dict[str, Any], str, tuple[int, ...]], ModelConfig]
"""A model package's own reader: config.json's values, the file's name for errors, the end-of-sequence token ids.

It may call `parse_hf_config`, and raises ModelError or UnsupportedModelError.
"""


def read_hf_config(
    folder: Path,
    architectures: Collection[str] = SUPPORTED_ARCHITECTURES,
    readers: Mapping[str, ConfigReader] = MappingProxyType({}),
) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder: config.json, end tokens of generation_config.json merged.

    An architecture in `readers` is read by its own. Raises ModelError (absent or malformed file, missing key)
    and UnsupportedModelError.
    """
    values = _read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    ends = _token_ids(values.get("eos_token_id"))
    if generation.exists():
        ends += _token_ids(_read_json(generation).get("eos_token_id"))
    where = str(folder / "config.json")
    reader = readers.get(_architecture(values, where, architectures))
    if reader is not None:
        return reader(values, where, ends)
    return parse_hf_config(values, where, architectures, ends)


def parse_hf_config(
    values: dict[str, Any],
    where: str,
    architectures: Collection[str],
    ends: tuple[int, ...],
    activations: Mapping[str, str] = MappingProxyType(ACTIVATIONS),
) -> ModelConfig:
    """The ModelConfig that config.json's `values` describe; `ends` are the end-of-sequence token ids.

    `activations` maps the values of `hidden_act` that the model serves to the op of its gate, without `_mul`.
    """
    architecture = _architecture(values, where, architectures)
    _refuse(values, where)
    experts = _experts(values, where) if architecture == "Qwen3MoeForCausalLM" else {}
    activation = str(values.get("hidden_act", "silu"))
    if activation not in activations:
        raise UnsupportedModelError(f"the activation {activation!r} is not built", where=where,
                                    hint=f"Built: {', '.join(activations)}.")  # fmt: skip
    num_layers = _size(values, "num_hidden_layers", where)
    num_heads = _size(values, "num_attention_heads", where)
    hidden = _size(values, "hidden_size", where)
    head_dim = 128 if architecture == "Qwen3ForCausalLM" else hidden // num_heads
    head_dim = _size(values, "head_dim", where, head_dim)
    num_kv_heads = _size(values, "num_key_value_heads", where, num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise ModelError(
            f"{num_heads} query heads, {num_kv_heads} key/value heads of size {head_dim} do not fit together",
            where=where,
        )
    positions = _size(values, "max_position_embeddings", where)
    rope = _rope(values, where, positions)
    window, sliding = _sliding(values, architecture, num_layers, where)
    bias = architecture != "MistralForCausalLM" and bool(values.get("attention_bias", False))
    return ModelConfig(
        architecture=architecture,
        vocab_size=_size(values, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=_size(values, "intermediate_size", where),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=max(positions, int(rope.original_max_position * rope.factor))
        if rope.kind == "yarn" else positions,
        rms_norm_eps=_number(values, "rms_norm_eps", where, 1e-6),
        rope=rope,
        activation=activations[activation],
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        attention_bias=architecture == "Qwen2ForCausalLM" or bias,
        output_bias=architecture != "Qwen2ForCausalLM" and bias,
        mlp_bias=architecture not in (*_QWEN, "MistralForCausalLM") and bool(values.get("mlp_bias", False)),
        sliding_window=window,
        sliding_layers=sliding,
        **experts,
        dtype=_dtype(values, where),
        bos_token_id=next(iter(_token_ids(values.get("bos_token_id"))), None),
        eos_token_ids=tuple(dict.fromkeys(ends)),
        raw=values,
    )  # fmt: skip


def _architecture(values: dict[str, Any], where: str, architectures: Collection[str]) -> str:
    named = values.get("architectures")
    if not isinstance(named, list) or not named:
        raise ModelError("it names no architecture", where=where, hint='Add "architectures": ["..."].')
    if named[0] not in architectures:
        raise UnsupportedModelError(
            f"the architecture {named[0]} is not built",
            where=where,
            hint=f"Built: {', '.join(sorted(architectures))}.",
        )
    return str(named[0])


def _refuse(values: dict[str, Any], where: str) -> None:
    quantization = values.get("quantization_config")
    if quantization:
        scheme = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else "unnamed"
        raise UnsupportedModelError(
            f"weights quantized with {scheme} are not served",
            where=where,
            hint="Use an unquantized safetensors checkpoint or a GGUF file.",
        )


def _experts(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of ModelConfig that say which layers are mixtures of experts, and of how many."""
    for key in ("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts"):
        if values.get(key):
            raise UnsupportedModelError("shared experts are not built", where=where, why=[f"{key} is {values[key]}"])
    # transformers 5 writes the second name
    count = _size(values, "num_experts" if values.get("num_experts") is not None else "num_local_experts", where)
    chosen = _size(values, "num_experts_per_tok", where)
    if chosen > count:
        raise ModelError(f"num_experts_per_tok is {chosen}, there are {count} experts", where=where)
    num_layers = _size(values, "num_hidden_layers", where)
    step = _size(values, "decoder_sparse_step", where, 1)
    dense = values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < num_layers for i in dense):
        raise ModelError(f"mlp_only_layers must list some of the layers 0 to {num_layers - 1}, got {dense!r}",
                         where=where)  # fmt: skip
    normalized = values.get("norm_topk_prob", False)
    if not isinstance(normalized, bool):
        raise ModelError(f"norm_topk_prob must be true or false, got {normalized!r}", where=where)
    return {
        "num_experts": count,
        "experts_per_token": chosen,
        "moe_intermediate_size": _size(values, "moe_intermediate_size", where),
        "norm_topk_prob": normalized,
        "sparse_layers": frozenset(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0),
    }


def _sliding(
    values: dict[str, Any], architecture: str, num_layers: int, where: str
) -> tuple[int | None, frozenset[int]]:
    if architecture == "MistralForCausalLM":
        if values.get("sliding_window", _DEFAULT_WINDOW) is None:
            return None, frozenset()
        window = _size(values, "sliding_window", where, _DEFAULT_WINDOW)
        return window, frozenset(range(num_layers))
    if architecture == "Qwen3MoeForCausalLM" and values.get("use_sliding_window"):  # in every layer
        if values.get("sliding_window", _DEFAULT_WINDOW) is None:
            return None, frozenset()
        return _size(values, "sliding_window", where, _DEFAULT_WINDOW), frozenset(range(num_layers))
    if architecture not in _QWEN or not values.get("use_sliding_window") or not values.get("sliding_window"):
        return None, frozenset()
    window = _size(values, "sliding_window", where)
    types = values.get("layer_types")
    if types is None:
        return window, frozenset(range(_count(values, "max_window_layers", where, 28), num_layers))
    if not isinstance(types, list) or len(types) != num_layers:
        raise ModelError(f"layer_types must name {num_layers} layers", where=where)
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(f"layers of type {', '.join(map(str, unknown))} are not built", where=where)
    sliding = frozenset(i for i, kind in enumerate(types) if kind == "sliding_attention")
    return (window, sliding) if sliding else (None, sliding)


def _rope(values: dict[str, Any], where: str, positions: int) -> RopeConfig:
    """Transformers 5 keeps everything in `rope_parameters`; 4 has `rope_theta` beside `rope_scaling`."""
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    theta = _number(rope, "rope_theta", where, _number(values, "rope_theta", where, 10000.0))
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError(f"a partial rotary factor of {partial} is not built", where=where)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind not in ("linear", "llama3", "yarn"):
        raise UnsupportedModelError(
            f"rope scaling {kind!r} is not built", where=where, hint="Built: default, linear, llama3, yarn."
        )
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=_number(rope, "factor", where))
    original = rope.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
    original = _size({"original_max_position_embeddings": original}, "original_max_position_embeddings",
                     where, positions if kind == "yarn" else None)  # fmt: skip
    if kind == "llama3":
        return RopeConfig(
            theta=theta, kind=kind, factor=_number(rope, "factor", where), original_max_position=original,
            low_freq_factor=_number(rope, "low_freq_factor", where),
            high_freq_factor=_number(rope, "high_freq_factor", where),
        )  # fmt: skip
    if rope.get("truncate", True) is False:
        raise UnsupportedModelError("yarn with truncate=false is not built", where=where)
    factor = _number(rope, "factor", where, positions / original)
    return RopeConfig(
        theta=theta, kind=kind, factor=factor, original_max_position=original,
        beta_fast=_number(rope, "beta_fast", where, 32.0), beta_slow=_number(rope, "beta_slow", where, 1.0),
        attention_factor=_attention_factor(rope, where, factor),
    )  # fmt: skip


def _attention_factor(rope: dict[str, Any], where: str, factor: float) -> float:
    """YaRN's scale on queries and keys (section 3.4 of the paper), with DeepSeek's two-part form."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor", where)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(_number(rope, "mscale", where)) / scale(_number(rope, "mscale_all_dim", where))
    return scale(1.0)


def _dtype(values: dict[str, Any], where: str) -> str:
    name = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise UnsupportedModelError(f"weights of dtype {name} are not served", where=where,
                                    hint=f"Served: {', '.join(_DTYPES)}.")  # fmt: skip
    return name


def _size(values: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = _count(values, key, where, default)
    if value == 0:
        raise ModelError(f"{key} must be at least 1", where=where)
    return value


def _count(values: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise ModelError(f"{key} is missing", where=where)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ModelError(f"{key} must be a whole number, got {value!r}", where=where)
    return value


def _number(values: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise ModelError(f"{key} is missing", where=where)
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ModelError(f"{key} must be a positive number, got {value!r}", where=where)
    return float(value)


def _token_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,)
    return tuple(v for v in value if isinstance(v, int)) if isinstance(value, list) else ()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except OSError as e:
        raise ModelError("cannot read the file", where=str(path), why=e.strerror or str(e)) from e
    except ValueError as e:
        raise ModelError("not valid JSON", where=str(path), why=str(e), hint="Fetch it again.") from e
    if not isinstance(values, dict):
        raise ModelError("not a JSON object", where=str(path))
    return values
