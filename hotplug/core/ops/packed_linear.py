"""Ops on matrices in groups, as checkpoints store them: their references dequantize, then compute in floating point.

The formats are described in `hotplug.core.quant.packed_scheme`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hotplug.core.ops.dense import silu_mul
from hotplug.core.ops.registry import Bind, Fn, Op, SiteSpec

GROUP = 32
"""Weights of a group."""
GROUP_BYTES = {"q4_0": 18, "q4_1": 20, "q8_0": 34}
"""By format."""


def dequantize(data: Tensor, scheme: str) -> Tensor:
    """Float32 [rows, columns] of groups `data` uint8 [rows, bytes of a row] in the format `scheme`."""
    rows, count = data.shape[0], data.shape[1] // GROUP_BYTES[scheme]
    groups = data.reshape(rows, count, GROUP_BYTES[scheme])
    scale = groups[..., :2].contiguous().view(torch.float16).to(torch.float32)
    if scheme == "q8_0":
        return (groups[..., 2:].contiguous().view(torch.int8) * scale).reshape(rows, count * GROUP)
    start = 4 if scheme == "q4_1" else 2
    packed = groups[..., start:]
    weights = torch.cat((packed & 15, packed >> 4), -1)
    if scheme == "q4_0":
        return ((weights.to(torch.int8) - 8) * scale).reshape(rows, count * GROUP)
    least = groups[..., 2:4].contiguous().view(torch.float16).to(torch.float32)
    return (weights * scale + least).reshape(rows, count * GROUP)


def scheme_of(data: Tensor, columns: int) -> str:
    """The format of groups `data` [rows, bytes of a row] that hold `columns` weights a row: each has a size of its own.

    Raises ValueError where none has this size.
    """
    for name, size in GROUP_BYTES.items():
        if data.shape[1] * GROUP == columns * size:
            return name
    raise ValueError(f"rows of {data.shape[1]} bytes do not hold {columns} weights in a format that is known")


def embed_packed(token_ids: Tensor, data: Tensor, hidden: int) -> Tensor:
    """Rows of a table in groups, `data` uint8 [vocab, bytes of a row], for `token_ids` [num_tokens].

    Returns float32 [num_tokens, hidden].
    """
    return dequantize(data[token_ids], scheme_of(data, hidden))


def linear_packed(x: Tensor, data: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` with its weight in groups: `x` [num_tokens, in], `data` uint8 [out, bytes of a row], `bias` [out].

    Kernels may round x to eight bits with a scale a group.
    """
    return F.linear(x, dequantize(data, scheme_of(data, x.shape[1])).to(x.dtype), bias)


def linear_packed_silu_mul(x: Tensor, data: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_packed` to 2n outputs, then `silu_mul`: [num_tokens, in] to [num_tokens, n]. Gate rows come first."""
    return silu_mul(linear_packed(x, data, bias))


def lower_linear_packed_silu_mul(bind: Bind, spec: SiteSpec) -> Fn:
    width = spec["width"]
    project = bind("linear_packed", "linear", in_features=spec["in_features"], out_features=2 * width,
                   bias=spec["bias"], scheme=spec["scheme"])  # fmt: skip
    gate = bind("silu_mul", "act", width=width)

    def composed(x: Tensor, data: Tensor, bias: Tensor | None) -> Tensor:
        return gate(project(x, data, bias))

    return composed


def logits_packed(hidden: Tensor, data: Tensor, bias: Tensor | None) -> Tensor:
    """`logits` with its weight in groups: float32 [num_rows, vocab]. Kernels may round as those of `linear_packed`."""
    return linear_packed(hidden, data, bias).to(torch.float32)


LINEAR = Op("linear_packed", linear_packed, facts=("in_features", "out_features", "bias", "scheme"))
OPS = (
    Op("embed_packed", embed_packed, facts=("vocab", "hidden", "scheme")),
    LINEAR,
    Op(
        "linear_packed_silu_mul",
        linear_packed_silu_mul,
        facts=("in_features", "width", "bias", "scheme"),
        lower=lower_linear_packed_silu_mul,
    ),
    Op("logits_packed", logits_packed, facts=("hidden", "vocab", "bias", "scheme")),
)
