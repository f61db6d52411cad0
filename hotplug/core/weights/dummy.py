"""Random weights from a config alone: for benchmarks of shapes whose real weights are not at hand.

The names and shapes are those a real checkpoint of the architecture has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hotplug.core.weights.config import ModelConfig
from hotplug.core.weights.dequantize_target import DequantizeTarget, no_target

_STD = 0.02


@dataclass(frozen=True)
class DummyCheckpoint:
    """Weights drawn from N(0, 0.02), norm weights 1; the same for the same (seed, name, device kind)."""

    config: ModelConfig
    files: tuple[Path, ...]
    seed: int

    @property
    def formats(self) -> Mapping[str, str]:
        """No matrix is in groups."""
        return {}

    def tensors(
        self, keep: Collection[str] = (), target: DequantizeTarget = no_target
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face names with CPU tensors of the config's dtype."""
        dtype = getattr(torch, self.config.dtype)
        for name, shape in parameter_shapes(self.config).items():
            tensor = torch.empty(shape, dtype=dtype)
            self.fill(name, tensor)
            yield name, tensor

    def release(self) -> None:
        """Nothing is mapped."""

    def fill(self, name: str, tensor: torch.Tensor) -> None:
        """Fill `tensor`, on whatever device it is, with the weights called `name`, in place."""
        if name.removesuffix(".weight").endswith("norm"):
            tensor.fill_(1.0)
            return
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator(device=tensor.device)
        generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        tensor.normal_(0.0, _STD, generator=generator)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face parameter names and shapes of the decoders (Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE)."""
    hidden = config.hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}

    def linear(name: str, out_features: int, in_features: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (out_features, in_features)
        if bias:
            shapes[f"{name}.bias"] = (out_features,)

    def feed_forward(name: str, width: int, bias: bool) -> None:
        linear(f"{name}.gate_proj", width, hidden, bias)
        linear(f"{name}.up_proj", width, hidden, bias)
        linear(f"{name}.down_proj", hidden, width, bias)

    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        linear(f"{prefix}.self_attn.q_proj", queries, hidden, config.attention_bias)
        linear(f"{prefix}.self_attn.k_proj", keys, hidden, config.attention_bias)
        linear(f"{prefix}.self_attn.v_proj", keys, hidden, config.attention_bias)
        linear(f"{prefix}.self_attn.o_proj", hidden, queries, config.output_bias)
        if config.architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"):
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        if layer in config.sparse_layers:
            linear(f"{prefix}.mlp.gate", config.num_experts, hidden, bias=False)
            for expert in range(config.num_experts):
                feed_forward(f"{prefix}.mlp.experts.{expert}", config.moe_intermediate_size, bias=False)
        else:
            feed_forward(f"{prefix}.mlp", config.intermediate_size, bias=config.mlp_bias)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes
