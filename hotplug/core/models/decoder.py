"""The decoder-only transformer that Llama, Mistral, Qwen2 and Qwen3 share; they differ in `ModelConfig` only.

Qwen2's biases, Mistral's window and Qwen3-MoE's experts are config fields; Qwen3 also normalizes each query and key
head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hotplug.core.kv.spec import FullAttention, KVSpec, SlidingWindow
from hotplug.core.layers.attention import Attention
from hotplug.core.layers.context import BuildContext
from hotplug.core.layers.dense import AddRMSNorm, GateUp, Linear, QuantizedLinear, RMSNorm
from hotplug.core.layers.destination import Destination
from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.layers.mlp import GatedMLP
from hotplug.core.layers.moe import SparseMLP, unstacked
from hotplug.core.layers.rope import rotary_table
from hotplug.core.layers.table import Head, make_embedding, table_destination
from hotplug.core.models.split import destination_of_rank
from hotplug.core.ops.inputs import StepInputs
from hotplug.core.weights.config import ModelConfig


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm; the residual runs beside."""

    attention_class: type[Attention] = Attention

    def __init__(
        self, ctx: BuildContext, config: ModelConfig, layer: int, *, qk_norm: bool, reduce: bool = True
    ) -> None:
        """`reduce`: the norms add up what several ranks computed before them."""
        super().__init__()
        site, hidden, eps = f"layers.{layer}", config.hidden_size, config.rms_norm_eps
        self.attn_norm: RMSNorm | AddRMSNorm
        if layer == 0:
            self.attn_norm = RMSNorm(ctx, f"{site}.attn_norm", hidden, eps)
        else:
            self.attn_norm = AddRMSNorm(ctx, f"{site}.attn_norm", hidden, eps, reduce=reduce)
        self.attn = self.attention_class(ctx, f"{site}.attn", config, layer, qk_norm=qk_norm)
        self.mlp_norm = AddRMSNorm(ctx, f"{site}.mlp_norm", hidden, eps, reduce=reduce)
        mlp = SparseMLP if layer in config.sparse_layers else GatedMLP
        self.mlp = mlp(ctx, f"{site}.mlp", config)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        step: StepInputs,
        cos_sin: Tensor,
        lanes: list[KVBlocks],
        *,
        scored_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """With `scored_only`, keys and values of all tokens, and the rest of the scored ones alone."""
        if residual is None:
            residual, x = x, self.attn_norm(x)
        else:
            x, residual = self.attn_norm(x, residual)
        x = self.attend(x, step, cos_sin, lanes, scored_only=scored_only)
        if scored_only:
            residual = residual[step.logit_indices]
        x, residual = self.mlp_norm(x, residual)
        return self.feed_forward(x), residual

    def attend(
        self, x: Tensor, step: StepInputs, cos_sin: Tensor, lanes: list[KVBlocks], *, scored_only: bool
    ) -> Tensor:
        """What attention adds to the residual."""
        mixed: Tensor = self.attn(x, step, cos_sin, lanes, scored_only=scored_only)
        return mixed

    def feed_forward(self, x: Tensor) -> Tensor:
        """What the feed-forward part adds to the residual."""
        fed: Tensor = self.mlp(x)
        return fed


class Decoder(nn.Module):
    """Token ids to hidden states, and hidden states to vocabulary scores."""

    qk_norm = False
    layer_class: type[DecoderLayer] = DecoderLayer
    mlp_norm_name = "post_attention_layernorm"
    """What checkpoints call the norm before the feed-forward part."""
    norms_reduce = True
    """Whether the norms before layers' parts add up what several ranks computed, so that the parts need not."""
    cos_sin: Tensor

    def __init__(self, ctx: BuildContext, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._rank, self._ranks = ctx.rank, ctx.ranks
        table = make_embedding(ctx, "embed", config.vocab_size, config.hidden_size)
        self.embed: nn.Module = table
        self.layers = nn.ModuleList(
            self.layer_class(ctx, config, i, qk_norm=self.qk_norm) for i in range(config.num_layers)
        )
        self.norm = AddRMSNorm(ctx, "norm", config.hidden_size, config.rms_norm_eps, reduce=self.norms_reduce)
        tied = table if config.tie_word_embeddings else None
        self.head = Head(ctx, "logits", config.hidden_size, config.vocab_size, tied)
        self.register_buffer(
            "cos_sin", rotary_table(config.rope, config.head_dim, ctx.max_position, ctx.device), persistent=False
        )

    @classmethod
    def kv_specs(cls, config: ModelConfig) -> list[KVSpec]:
        """What each layer keeps of a sequence, in the order of the layers."""
        geometry = {"num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        full = FullAttention(**geometry)
        if config.sliding_window is None:
            return [full] * config.num_layers
        window = SlidingWindow(**geometry, window=config.sliding_window)
        return [window if layer in config.sliding_layers else full for layer in range(config.num_layers)]

    def forward(self, step: StepInputs, kv: Sequence[KVBlocks]) -> tuple[Tensor, list[KVBlocks]]:
        """Hidden states [num_tokens, hidden] of the step's tokens after the last norm, and the caches written.

        Where the step has `scored`, those of its S scored tokens alone: [S, hidden].

        `kv` are the lanes of the KV cache (`hotplug.core.kv.groups`). The ones returned are those given unless a
        whole-step program is being made (`kv_write`).
        """
        x, residual = self.embed(step.token_ids), None
        lanes = list(kv)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            only = i == last and step.scored is not None
            x, residual = layer(x, residual, step, self.rotary(i), lanes, scored_only=only)
        return self.norm(x, residual)[0], lanes

    def rotary(self, layer: int) -> Tensor:
        """The rotary table of a layer, float32 [max_position, head_dim]."""
        return self.cos_sin

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 [num_rows, vocab] of hidden states [num_rows, hidden]."""
        return self.head(hidden)

    def destinations(self) -> Iterator[tuple[str, Destination]]:
        """Where each checkpoint tensor goes: its Hugging Face name and the parameter, or slice of one, it fills."""
        for name, destination in self._whole_destinations():
            yield name, destination_of_rank(name, destination, self._rank, self._ranks)

    def _whole_destinations(self) -> Iterator[tuple[str, Destination]]:
        """`destinations` of a model that one rank has alone."""
        hidden = self.config.hidden_size
        yield "model.embed_tokens.weight", table_destination(self.embed, hidden)
        yield "model.norm.weight", self.norm.weight
        if not self.config.tie_word_embeddings:
            yield "lm_head.weight", table_destination(self.head, hidden)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield from _layer_destinations(f"model.layers.{i}", layer, self.mlp_norm_name)

    def named(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A checkpoint tensor by the names of `destinations`: itself, or the several that it stacks."""
        yield name, tensor


def _layer_destinations(prefix: str, layer: DecoderLayer, mlp_norm: str) -> Iterator[tuple[str, Destination]]:
    attn, mlp = layer.attn, layer.mlp
    yield f"{prefix}.input_layernorm.weight", layer.attn_norm.weight
    yield f"{prefix}.{mlp_norm}.weight", layer.mlp_norm.weight
    yield from _stacked(f"{prefix}.self_attn", ("q_proj", "k_proj", "v_proj"), attn.qkv, attn.sizes)
    yield from _stacked(f"{prefix}.self_attn", ("o_proj",), attn.out, [mlp.hidden_size])
    if attn.q_norm is not None and attn.k_norm is not None:
        yield f"{prefix}.self_attn.q_norm.weight", attn.q_norm
        yield f"{prefix}.self_attn.k_norm.weight", attn.k_norm
    if isinstance(mlp, SparseMLP):
        yield from mlp.destinations(f"{prefix}.mlp")
        return
    half = mlp.width
    yield from _stacked(f"{prefix}.mlp", ("gate_proj", "up_proj"), mlp.gate_up, [half, half])
    yield from _stacked(f"{prefix}.mlp", ("down_proj",), mlp.down, [mlp.hidden_size])


def _stacked(
    prefix: str, names: Sequence[str], linear: Linear | QuantizedLinear | GateUp, sizes: list[int]
) -> Iterator[tuple[str, Destination]]:
    """The parts of a linear layer that stacks several checkpoint matrices along its outputs."""
    for name, weight in zip(names, linear.rows(sizes), strict=True):
        yield f"{prefix}.{name}.weight", weight
    if linear.bias is not None:
        for name, bias in zip(names, torch.split(linear.bias, sizes), strict=True):
            yield f"{prefix}.{name}.bias", bias


class Qwen3Decoder(Decoder):
    """Normalizes every query and key head before rotation."""

    qk_norm = True


class Qwen3MoeDecoder(Qwen3Decoder):
    """Its checkpoints have experts one by one or stacked."""

    def named(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        return unstacked(name, tensor)
