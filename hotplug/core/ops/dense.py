"""Embedding, matrix products and activations: the ops of a dense layer, each with its reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hotplug.core.ops.registry import Bind, Fn, Op, SiteSpec


def embed(token_ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight` [vocab, hidden] for `token_ids` [num_tokens]; returns [num_tokens, hidden]."""
    return F.embedding(token_ids, weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x` [num_tokens, in] times `weight` [out, in] transposed, plus `bias` [out]; [num_tokens, out]."""
    return F.linear(x, weight, bias)


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's gating (Shazeer, 2020): silu of the first half of `gate_up` [num_tokens, 2n] times the second."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """GEGLU's gating (Shazeer, 2020): gelu by tanh of the first half of `gate_up` [num_tokens, 2n] times the second."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def linear_silu_mul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` to 2n outputs, then `silu_mul`: [num_tokens, in] to [num_tokens, n]. Gate rows of `weight` first."""
    return silu_mul(linear(x, weight, bias))


def lower_linear_silu_mul(bind: Bind, spec: SiteSpec) -> Fn:
    width = spec["width"]
    project = bind("linear", "linear", in_features=spec["in_features"], out_features=2 * width, bias=spec["bias"],
                   scheme=spec["scheme"])  # fmt: skip
    gate = bind("silu_mul", "act", width=width)

    def composed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return gate(project(x, weight, bias))

    return composed


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Vocabulary scores of `hidden` [num_rows, hidden] as float32 [num_rows, vocab]; `weight` [vocab, hidden]."""
    return F.linear(hidden, weight, bias).to(torch.float32)


OPS = (
    Op("embed", embed, facts=("vocab", "hidden")),
    Op("linear", linear, facts=("in_features", "out_features", "bias", "scheme")),
    Op("silu_mul", silu_mul, facts=("width",)),
    Op("gelu_tanh_mul", gelu_tanh_mul, facts=("width",)),
    Op(
        "linear_silu_mul",
        linear_silu_mul,
        facts=("in_features", "width", "bias", "scheme"),
        lower=lower_linear_silu_mul,
    ),
    Op("logits", logits, facts=("hidden", "vocab", "bias", "scheme")),
)
