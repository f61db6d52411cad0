"""The Gemma architecture (Gemma Team, 2024) as a hotplug plugin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hotplug.plugins import (
    BuildContext,
    Converted,
    Decoder,
    Destination,
    Embedding,
    Extension,
    ModelConfig,
    Op,
    parse_hf_config,
)

ARCHITECTURE = "GemmaForCausalLM"
TANH_GELU = ("gelu_pytorch_tanh", "gelu")
"""Published configs name either; both were trained with the tanh form."""


def gelu_mul(gate_up: Tensor) -> Tensor:
    """GEGLU's gating (Shazeer, 2020): gelu of the first half of `gate_up` [num_tokens, 2n] times the second."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


class ScaledEmbedding(nn.Module):
    """Token ids [num_tokens] to vectors [num_tokens, hidden] of unit scale."""

    def __init__(self, embedding: Embedding, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = embedding
        self.scheme = embedding.scheme
        # In the model's dtype, as it was trained: 2048 ** 0.5 is 45.25 in bfloat16
        self.scale = torch.tensor(hidden**0.5, dtype=dtype).item()

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.inner(token_ids) * self.scale


class GemmaDecoder(Decoder):
    """The shared decoder with scaled embeddings, and norms that count from one."""

    def __init__(self, ctx: BuildContext, config: ModelConfig) -> None:
        super().__init__(ctx, config)
        self.embed = ScaledEmbedding(self.embed, config.hidden_size, ctx.dtype)

    def destinations(self) -> Iterator[tuple[str, Destination]]:
        for name, place in super().destinations():
            yield name, Converted(place, lambda weight: weight + 1.0) if name.endswith("norm.weight") else place


def read_config(values: dict[str, Any], where: str, ends: tuple[int, ...]) -> ModelConfig:
    """config.json of a Gemma checkpoint; what it leaves out is Gemma's default and not Llama's."""
    values = {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": TANH_GELU[0], **values}
    if values.get("hidden_activation"):  # the later name wins, as in transformers
        values["hidden_act"] = values["hidden_activation"]
    return parse_hf_config(values, where, (ARCHITECTURE,), ends, dict.fromkeys(TANH_GELU, "gelu"))


def plugin() -> Extension:
    return Extension(
        models={ARCHITECTURE: GemmaDecoder},
        ops=(Op("gelu_mul", gelu_mul, facts=("width",)),),
        config_readers={ARCHITECTURE: read_config},
    )
