"""Mixture of experts: which experts a token goes to, and what they make of it (Shazeer et al., 2017).

The references have no shape that depends on data and read nothing on the host, so that steps of static shape may be
recorded: every expert sees every token, and what it was not chosen for counts nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hotplug.core.ops.registry import Bucket, Op


def moe_route(x: Tensor, weight: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The `top_k` best experts of each token of `x` [num_tokens, hidden], and how much each counts.

    `weight` [num_experts, hidden] scores the experts in the dtype of `x`; their softmax is over all of them, in
    float32. Returns float32 weights [num_tokens, top_k], which `renormalize` divides by their sum, and int32 experts
    of the same shape: best first, of equal scores the lower number first, and none twice.
    """
    scores = F.linear(x, weight)
    # Sorted and not torch.topk, whose order of equal scores is anybody's.
    experts = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.softmax(-1, dtype=torch.float32).gather(-1, experts)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts.to(torch.int32)


def moe_experts(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What the chosen `experts` make of `x` [num_tokens, hidden], summed by `weights`; same shape and dtype.

    An expert is a SwiGLU layer (Shazeer, 2020): `down` [num_experts, hidden, width] of silu of the first half of
    `gate_up` [num_experts, 2 * width, hidden] times the second, in the dtype of `x`. `weights` float32 and `experts`
    int32 [num_tokens, top_k]; the sum is in float32.
    """
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(gate_up.shape[0]):
        mine = experts == expert
        gate, up = F.linear(x, gate_up[expert]).chunk(2, dim=-1)
        mixed = F.linear(F.silu(gate) * up, down[expert])
        share = torch.where(mine, weights, 0.0).sum(-1, keepdim=True)
        # Not share * mixed alone: what another token makes overflow here is no business of this one.
        total = total + torch.where(mine.any(-1, keepdim=True), share * mixed, 0.0)
    return total.to(x.dtype)


def _bucket(x: Tensor, *_: Any) -> Bucket:
    return Bucket(x.shape[0], x.shape[0])


OPS = (
    Op("moe_route", moe_route, facts=("hidden", "num_experts", "top_k", "renormalize"), bucket=_bucket),
    Op("moe_experts", moe_experts, facts=("hidden", "width", "num_experts", "top_k"), bucket=_bucket),
)
