"""Gemma 3, text (Gemma Team, 2025): five layers of six see a window, norms stand around attention and feed-forward.

What differs from the shared decoder: scaled embeddings, norm weights that count from one, a second norm after each
part, a rotary table of its own for the layers with a window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hotplug.core.errors import ModelError, UnsupportedModelError
from hotplug.core.layers.context import BuildContext
from hotplug.core.layers.dense import ReduceRMSNorm
from hotplug.core.layers.destination import Converted, Destination
from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.layers.rope import rotary_table
from hotplug.core.models.decoder import Decoder, DecoderLayer
from hotplug.core.ops.inputs import StepInputs
from hotplug.core.weights.config import ModelConfig
from hotplug.core.weights.hf_config import parse_hf_config
from hotplug.core.weights.hf_rope import read_rope
from hotplug.core.weights.limits import MOST_LAYERS, MOST_POSITIONS, SCALE
from hotplug.core.weights.metadata import Metadata, shown

ARCHITECTURE = "Gemma3ForCausalLM"
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
"""What transformers takes for keys that a config.json leaves out."""
_FULL, _SLIDING = "full_attention", "sliding_attention"
_THETA = {_FULL: 1_000_000.0, _SLIDING: 10_000.0}


class Gemma3Layer(DecoderLayer):
    """Norms after attention and after the feed-forward part too, before the residual is added."""

    def __init__(self, ctx: BuildContext, config: ModelConfig, layer: int, *, qk_norm: bool) -> None:
        super().__init__(ctx, config, layer, qk_norm=qk_norm, reduce=False)
        site, hidden, eps = f"layers.{layer}", config.hidden_size, config.rms_norm_eps
        self.post_attn_norm = ReduceRMSNorm(ctx, f"{site}.post_attn_norm", hidden, eps)
        self.post_mlp_norm = ReduceRMSNorm(ctx, f"{site}.post_mlp_norm", hidden, eps)

    def attend(
        self, x: Tensor, step: StepInputs, cos_sin: Tensor, lanes: list[KVBlocks], *, scored_only: bool
    ) -> Tensor:
        return self.post_attn_norm(super().attend(x, step, cos_sin, lanes, scored_only=scored_only))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.post_mlp_norm(super().feed_forward(x))


class ScaledEmbedding(nn.Module):
    """Token ids [num_tokens] to vectors [num_tokens, hidden] of unit scale."""

    def __init__(self, embedding: Any, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = embedding
        self.scheme = embedding.scheme
        # In the model's dtype, as it was trained: 1152 ** 0.5 is 34 in bfloat16
        self.scale = torch.tensor(hidden**0.5, dtype=dtype).item()

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.inner.weight
        return weight

    def forward(self, token_ids: Tensor) -> Tensor:
        rows: Tensor = self.inner(token_ids)
        return rows * self.scale


class Gemma3Decoder(Decoder):
    """The shared decoder with Gemma's layers, embeddings and two rotary tables."""

    qk_norm = True
    layer_class = Gemma3Layer
    norms_reduce = False  # those after each part do
    mlp_norm_name = "pre_feedforward_layernorm"
    cos_sin_sliding: Tensor

    def __init__(self, ctx: BuildContext, config: ModelConfig) -> None:
        super().__init__(ctx, config)
        self.embed = ScaledEmbedding(self.embed, config.hidden_size, ctx.dtype)
        assert config.sliding_rope is not None  # `read_config`
        table = rotary_table(config.sliding_rope, config.head_dim, ctx.max_position, ctx.device)
        self.register_buffer("cos_sin_sliding", table, persistent=False)

    def rotary(self, layer: int) -> Tensor:
        return self.cos_sin_sliding if layer in self.config.sliding_layers else self.cos_sin

    def _whole_destinations(self) -> Iterator[tuple[str, Destination]]:
        for name, destination in super()._whole_destinations():
            yield name, _from_one(destination) if name.endswith("norm.weight") else destination
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Gemma3Layer)
            prefix = f"model.layers.{i}"
            yield f"{prefix}.post_attention_layernorm.weight", _from_one(layer.post_attn_norm.weight)
            yield f"{prefix}.post_feedforward_layernorm.weight", _from_one(layer.post_mlp_norm.weight)


def _from_one(destination: Destination) -> Destination:
    return Converted(destination, lambda weight: weight + 1.0)


def read_config(values: dict[str, Any], where: str, ends: tuple[int, ...]) -> ModelConfig:
    """config.json of a Gemma 3 text checkpoint, as transformers 4 and 5 write it."""
    values = {**_DEFAULTS, **values}
    given = Metadata(values, where)
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if given.number(key, *SCALE, None) is not None:
            raise UnsupportedModelError(f"{key} is not built for Gemma 3", where=where)
    if given.flag("use_bidirectional_attention", False):
        raise UnsupportedModelError("attention to later tokens is not built", where=where)
    plain = {key: value for key, value in values.items() if key not in ("rope_parameters", "rope_scaling")}
    plain["hidden_act"] = values.get("hidden_activation") or values.get("hidden_act")
    full = _rope(values, given, _FULL)
    config = parse_hf_config({**plain, "rope_parameters": full}, where, (ARCHITECTURE,), ends,
                             {"gelu_pytorch_tanh": "gelu_tanh"})  # fmt: skip
    window = given.integer("sliding_window", 1, MOST_POSITIONS, 4096)
    sliding, _ = read_rope(Metadata({"rope_parameters": _rope(values, given, _SLIDING)}, where), config.max_position)
    return dataclasses.replace(
        config,
        sliding_window=window,
        sliding_layers=_sliding_layers(given, config.num_layers),
        sliding_rope=sliding,
        attention_scale=given.number("query_pre_attn_scalar", 1e-3, 1e6, 256.0) ** -0.5,
        raw=values,
    )


def _rope(values: dict[str, Any], given: Metadata, kind: str) -> dict[str, Any]:
    """The rotary parameters of a kind of layer, in the spelling of one kind."""
    parameters = given.section("rope_parameters")
    if parameters.is_section(kind):
        return {"rope_theta": _THETA[kind], **values["rope_parameters"][kind]}
    if kind == _SLIDING:
        theta = given.number("rope_local_base_freq", 1.0, 1e12, _THETA[kind])
        return {"rope_type": "default", "rope_theta": theta}
    scaling = values["rope_scaling"] if given.is_section("rope_scaling") else {}
    return {"rope_theta": given.number("rope_theta", 1.0, 1e12, _THETA[kind]), **scaling}


def _sliding_layers(given: Metadata, num_layers: int) -> frozenset[int]:
    types = given.texts("layer_types", most=MOST_LAYERS)
    if types is None:
        pattern = given.integer("sliding_window_pattern", 1, MOST_LAYERS, 6)
        return frozenset(layer for layer in range(num_layers) if (layer + 1) % pattern)
    if len(types) != num_layers:
        raise ModelError(f"layer_types must name {num_layers} layers", where=given.where)
    if unknown := set(types) - {_FULL, _SLIDING}:
        raise UnsupportedModelError(f"layers of type {shown(min(unknown))} are not built", where=given.where)
    return frozenset(layer for layer, kind in enumerate(types) if kind == _SLIDING)
