"""Self-attention over the paged KV cache, with grouped key/value heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hotplug.core.kv.spec import FullAttention
from hotplug.core.layers.context import BuildContext
from hotplug.core.layers.dense import make_linear
from hotplug.core.layers.kv_cache import KVBlocks, KVSlot
from hotplug.core.ops.inputs import StepInputs
from hotplug.core.ops.registry import Fact
from hotplug.core.weights.config import ModelConfig


class Attention(nn.Module):
    """Projections, rotary embedding, cache write and paged attention of one layer."""

    slot_class = KVSlot

    def __init__(self, ctx: BuildContext, site: str, config: ModelConfig, layer: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.kv = self.slot_class(ctx.kv, layer)
        spec, form = self.kv.spec, self.kv.form
        assert isinstance(spec, FullAttention)  # the model's own `kv_specs` said so
        heads, kv_heads, dim = config.num_heads, spec.num_kv_heads, spec.head_dim
        self.head_dim = dim
        self.head_counts = [heads, kv_heads, kv_heads]
        self.sizes = [count * dim for count in self.head_counts]
        self.window = spec.reach
        self.sinks: Tensor | None = None

        self.qkv = make_linear(ctx, f"{site}.qkv", config.hidden_size, sum(self.sizes), bias=config.attention_bias)
        self.out = make_linear(ctx, f"{site}.out", heads * dim, config.hidden_size, bias=config.output_bias)
        self.q_norm = ctx.weight(dim) if qk_norm else None
        self.k_norm = ctx.weight(dim) if qk_norm else None
        geometry: dict[str, Fact] = {"num_kv_heads": kv_heads, "head_dim": dim, "block_size": form.block_size,
                 "layout": form.layout, "kv_dtype": form.dtype}  # fmt: skip
        rotation: dict[str, Fact] = {"num_heads": heads, "rotary_dim": dim, **geometry}
        if qk_norm:
            write = ctx.bind("qk_norm_rope_kv_write", f"{site}.write", eps=config.rms_norm_eps, **rotation)
        else:
            write = ctx.bind("rope_kv_write", f"{site}.write", **rotation)
        self.rope_kv_write = write
        self.attention = ctx.bind(
            "attention", site, num_heads=heads, scale=config.attention_scale or dim**-0.5, window=self.window,
            sinks=self.sinks is not None, soft_cap=None, static=ctx.static_steps, **geometry,
        )  # fmt: skip

    def forward(
        self, x: Tensor, step: StepInputs, cos_sin: Tensor, lanes: list[KVBlocks], *, scored_only: bool = False
    ) -> Tensor:
        """x [num_tokens, hidden] -> [num_tokens, hidden]; `lanes` has the caches with the tokens' keys and values then.

        With `scored_only` the rows of `step.logit_indices` alone, [S, hidden]: `step.scored` must be there.
        """
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        q, k, v = torch.split_with_sizes(qkv, self.head_counts, dim=1)
        at = self.kv
        cache = (step.positions, cos_sin, *at.caches(lanes[at.lane]), step.slots[at.table])
        if self.q_norm is None:
            q, k_cache, v_cache = self.rope_kv_write(q, k, v, *cache)
        else:
            q, k_cache, v_cache = self.rope_kv_write(q, k, v, self.q_norm, self.k_norm, *cache)
        queries = step.attention[at.table]
        if scored_only:
            assert step.scored is not None
            q, queries = q[step.logit_indices], step.scored[at.table]
        mixed = self.attention(q, k_cache, v_cache, queries, self.sinks)
        at.store(lanes, (k_cache, v_cache))
        return self.out(mixed.flatten(1))
