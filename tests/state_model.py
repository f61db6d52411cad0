"""A model whose even layers keep a state of fixed size in the place of keys and values: a decaying sum of values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hotplug.core.layers.dense import make_linear
from hotplug.plugins import (
    Attention,
    BlockTensor,
    BuildContext,
    Decoder,
    DecoderLayer,
    Extension,
    FullAttention,
    KVBlocks,
    KVSlot,
    KVSpec,
    ModelConfig,
    RecurrentState,
    StepInputs,
    parse_hf_config,
)

ARCHITECTURE = "StateForCausalLM"
DECAY = 0.75


class DecayingSum(nn.Module):
    """x [num_tokens, hidden] -> [num_tokens, hidden]: a projection of all values so far, older ones less."""

    def __init__(self, ctx: BuildContext, site: str, config: ModelConfig, layer: int, *, qk_norm: bool) -> None:
        super().__init__()
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
        self.kv = KVSlot(ctx.kv, layer)
        self.qkv = make_linear(ctx, f"{site}.qkv", config.hidden_size, sum(self.sizes), bias=False)
        self.out = make_linear(ctx, f"{site}.out", heads * dim, config.hidden_size, bias=False)
        self.q_norm = self.k_norm = None

    def forward(
        self, x: Tensor, step: StepInputs, cos_sin: Tensor, lanes: list[KVBlocks], *, scored_only: bool = False
    ) -> Tensor:
        queries, _, values = self.qkv(x).split(self.sizes, dim=1)
        (states,) = self.kv.caches(lanes[self.kv.lane])
        inputs = step.attention[self.kv.table]
        assert inputs.query_lens_host is not None and inputs.seq_lens_host is not None
        summed, begin = torch.empty_like(values), 0
        for i, (count, length) in enumerate(zip(inputs.query_lens_host, inputs.seq_lens_host, strict=True)):
            page = inputs.block_table[i, 0]
            state = states[page] if length > count else torch.zeros_like(states[page])
            for at in range(begin, begin + count):
                state = DECAY * state + values[at]
                summed[at] = state
            states[page] = state
            begin += count
        mixed = queries * summed.repeat(1, queries.shape[1] // summed.shape[1])
        return self.out(mixed[step.logit_indices] if scored_only else mixed)


class StateLayer(DecoderLayer):
    @staticmethod
    def attention_class(ctx: BuildContext, site: str, config: ModelConfig, layer: int, *, qk_norm: bool) -> nn.Module:
        kind = Attention if layer % 2 else DecayingSum
        return kind(ctx, site, config, layer, qk_norm=qk_norm)


class StateDecoder(Decoder):
    layer_class = StateLayer

    @classmethod
    def kv_specs(cls, config: ModelConfig) -> list[KVSpec]:
        state = RecurrentState(states=(BlockTensor((config.num_kv_heads * config.head_dim,), "float32"),))
        full = FullAttention(num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)
        return [full if layer % 2 else state for layer in range(config.num_layers)]


def read_config(values: dict[str, Any], where: str, ends: tuple[int, ...]) -> ModelConfig:
    return parse_hf_config(values, where, (ARCHITECTURE,), ends)


def plugin() -> Extension:
    return Extension(models={ARCHITECTURE: StateDecoder}, config_readers={ARCHITECTURE: read_config})
