"""config.json -> ModelConfig, in the spellings of transformers 4 and 5.

Only what the built models honour is read; a setting that would change the result and is not built is refused
by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hotplug.core.errors import ModelError, UnsupportedModelError
from hotplug.core.weights.config import ModelConfig
from hotplug.core.weights.hf_rope import read_rope
from hotplug.core.weights.limits import (
    EPS,
    MOST_EXPERTS,
    MOST_HEADS,
    MOST_LAYERS,
    MOST_POSITIONS,
    MOST_VOCAB,
    MOST_WIDTH,
)
from hotplug.core.weights.metadata import Metadata, read_json, read_json_object, shown
from hotplug.core.weights.token_ids import known_tokens, warn_of_unknown_tokens

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""config.json's `model_type`, by which transformers goes."""
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
    where = str(folder / "config.json")
    values = read_json_object(folder / "config.json")
    config = Metadata(values, where)
    architecture = _architecture(config, architectures)
    named: list[tuple[Metadata, str]] = [(config, "eos_token_id")]
    if (folder / "generation_config.json").exists():
        named.append((read_json(folder / "generation_config.json"), "eos_token_id"))
    vocab_size = config.integer("vocab_size", 1, MOST_VOCAB, None)
    ends = known_tokens(named, vocab_size or MOST_VOCAB)
    reader = readers.get(architecture)
    read = reader(values, where, ends) if reader else parse_hf_config(values, where, architectures, ends)
    warn_of_unknown_tokens([*named, (config, "bos_token_id")], read.vocab_size)
    return read


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
    config = Metadata(values, where)
    architecture = _architecture(config, architectures)
    _refuse(config)
    num_layers = config.integer("num_hidden_layers", 1, MOST_LAYERS)
    experts = _experts(config, num_layers) if architecture == "Qwen3MoeForCausalLM" else {}
    activation = config.text("hidden_act", "silu", most=100)
    if activation not in activations:
        raise UnsupportedModelError(f"the activation {activation!r} is not built", where=where,
                                    hint=f"Built: {', '.join(activations)}.")  # fmt: skip
    hidden = config.integer("hidden_size", 1, MOST_WIDTH)
    num_heads, num_kv_heads, head_dim = _heads(config, architecture, hidden)
    positions = config.integer("max_position_embeddings", 1, MOST_POSITIONS)
    rope, max_position = read_rope(config, positions)
    window, sliding = _sliding(config, architecture, num_layers)
    bias = architecture != "MistralForCausalLM" and config.flag("attention_bias", False)
    vocab_size = config.integer("vocab_size", 1, MOST_VOCAB)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size", 1, MOST_WIDTH),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=config.number("rms_norm_eps", *EPS, 1e-6),
        rope=rope,
        activation=activations[activation],
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        attention_bias=architecture == "Qwen2ForCausalLM" or bias,
        output_bias=architecture != "Qwen2ForCausalLM" and bias,
        mlp_bias=architecture not in (*_QWEN, "MistralForCausalLM") and config.flag("mlp_bias", False),
        sliding_window=window,
        sliding_layers=sliding,
        **experts,
        dtype=_dtype(config),
        bos_token_id=next(iter(known_tokens([(config, "bos_token_id")], vocab_size)), None),
        eos_token_ids=tuple(token for token in dict.fromkeys(ends) if 0 <= token < vocab_size),
        raw=values,
    )


def _architecture(config: Metadata, architectures: Collection[str]) -> str:
    named = config.texts("architectures", most=100)
    if not named:
        raise ModelError("it names no architecture", where=config.where, hint='Add "architectures": ["..."].')
    if named[0] not in architectures:
        raise UnsupportedModelError(
            f"the architecture {shown(named[0])} is not built",
            where=config.where,
            hint=f"Built: {', '.join(sorted(architectures))}.",
        )
    kind = config.text("model_type", "", most=100)
    if named[0] in SUPPORTED_ARCHITECTURES and _MODEL_TYPES.get(kind, named[0]) != named[0]:
        raise ModelError(f"architectures says {named[0]}, model_type {kind}", where=config.where,
                         hint="Correct the one that is wrong.")  # fmt: skip
    return named[0]


def _refuse(config: Metadata) -> None:
    """Refuse weights that are not stored in floating point."""
    key, scheme = "quantization_config", "an unnamed method"
    if config.is_section(key):
        if not any(config.section(key).keys()):
            return
        scheme = config.section(key).text("quant_method", scheme, most=100)
    elif not config.has(key):
        return
    raise UnsupportedModelError(
        f"weights quantized with {scheme} are not served",
        where=config.where,
        hint="Use an unquantized safetensors checkpoint or a GGUF file.",
    )


def _heads(config: Metadata, architecture: str, hidden: int) -> tuple[int, int, int]:
    """Numbers of query and key/value heads, and their size."""
    num_heads = config.integer("num_attention_heads", 1, MOST_HEADS)
    num_kv_heads = config.integer("num_key_value_heads", 1, MOST_HEADS, num_heads)
    head_dim = config.integer("head_dim", 2, MOST_WIDTH, None)
    if head_dim is None:
        if architecture != "Qwen3ForCausalLM" and hidden % num_heads:
            raise ModelError(f"hidden_size {hidden} is no multiple of num_attention_heads {num_heads}, "
                             "and head_dim is not given", where=config.where)  # fmt: skip
        head_dim = 128 if architecture == "Qwen3ForCausalLM" else hidden // num_heads
    if num_heads % num_kv_heads or head_dim % 2:
        raise ModelError(
            f"{num_heads} query heads, {num_kv_heads} key/value heads of size {head_dim} do not fit together",
            where=config.where,
        )
    return num_heads, num_kv_heads, head_dim


def _experts(config: Metadata, num_layers: int) -> dict[str, Any]:
    """The fields of ModelConfig that say which layers are mixtures of experts, and of how many."""
    for key in ("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts"):
        if shared := config.integer(key, 0, MOST_WIDTH, 0):
            raise UnsupportedModelError("shared experts are not built", where=config.where, why=f"{key} is {shared}")
    # transformers 5 writes the second name
    count = config.integer("num_experts" if config.has("num_experts") else "num_local_experts", 1, MOST_EXPERTS)
    step = config.integer("decoder_sparse_step", 1, MOST_LAYERS, 1)
    dense = set(config.integers("mlp_only_layers", 0, num_layers - 1, most=num_layers) or ())
    return {
        "num_experts": count,
        "experts_per_token": config.integer("num_experts_per_tok", 1, count),
        "moe_intermediate_size": config.integer("moe_intermediate_size", 1, MOST_WIDTH),
        "norm_topk_prob": config.flag("norm_topk_prob", False),
        "sparse_layers": frozenset(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0),
    }


def _sliding(config: Metadata, architecture: str, num_layers: int) -> tuple[int | None, frozenset[int]]:
    """The window, and the layers that have it; neither where attention is full."""
    full: tuple[None, frozenset[int]] = (None, frozenset())
    everywhere = frozenset(range(num_layers))
    if architecture not in (*_QWEN, "MistralForCausalLM"):
        return full
    if architecture in _QWEN and not config.flag("use_sliding_window", False):
        return full
    default = None if config.present("sliding_window") else _DEFAULT_WINDOW  # null is full attention
    window = config.integer("sliding_window", 1, MOST_POSITIONS, default)
    if window is None or architecture in ("MistralForCausalLM", "Qwen3MoeForCausalLM"):
        return full if window is None else (window, everywhere)
    types = config.texts("layer_types", most=MOST_LAYERS)
    if types is None:
        sliding = everywhere - set(range(config.integer("max_window_layers", 0, MOST_LAYERS, 28)))
        return (window, sliding) if sliding else full
    if len(types) != num_layers:
        raise ModelError(f"layer_types must name {num_layers} layers", where=config.where)
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(f"layers of type {shown(min(unknown))} are not built", where=config.where)
    sliding = frozenset(i for i, kind in enumerate(types) if kind == "sliding_attention")
    return (window, sliding) if sliding else full


def _dtype(config: Metadata) -> str:
    name = config.text("dtype" if config.has("dtype") else "torch_dtype", "float32", most=100)
    name = name.removeprefix("torch.")
    if name not in _DTYPES:
        raise UnsupportedModelError(f"weights of dtype {name} are not served", where=config.where,
                                    hint=f"Served: {', '.join(_DTYPES)}.")  # fmt: skip
    return str(name)
