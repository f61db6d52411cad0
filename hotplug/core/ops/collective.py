"""Collectives: what the ranks of an engine compute together. Their references are torch.distributed's.

All ranks make the same calls in the same order. They are the default process group, which the engine makes before
its first step; with a rank alone there is no such call site.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hotplug.core.ops.norm import add_rms_norm
from hotplug.core.ops.registry import Bind, Fn, Op, SiteSpec


def all_reduce(x: Tensor) -> Tensor:
    """The sum of all ranks' `x` [num_tokens, width], the same on each; `x` itself may be overwritten."""
    torch.distributed.all_reduce(x)
    return x


def all_gather(x: Tensor) -> Tensor:
    """The `x` [num_rows, width] of all ranks beside each other, in their order: [num_rows, ranks * width]."""
    parts = x.new_empty((torch.distributed.get_world_size(), *x.shape))
    torch.distributed.all_gather(list(parts.unbind()), x.contiguous())
    return parts.transpose(0, 1).flatten(1)


def all_reduce_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` of the sum of all ranks' `x` [num_tokens, width]."""
    return add_rms_norm(all_reduce(x), residual, weight, eps)


def lower_all_reduce_add_norm(bind: Bind, spec: SiteSpec) -> Fn:
    reduce = bind("all_reduce", "sum", width=spec["width"], group=spec["group"], ranks=spec["ranks"])
    norm = bind("add_rms_norm", "norm", width=spec["width"], eps=spec["eps"])

    def composed(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        normalized, total = norm(reduce(x), residual, weight)
        return normalized, total

    return composed


OPS = (
    Op("all_reduce", all_reduce, facts=("width", "group", "ranks")),
    Op("all_gather", all_gather, facts=("width", "group", "ranks")),
    Op(
        "all_reduce_add_norm",
        all_reduce_add_norm,
        facts=("width", "eps", "group", "ranks"),
        lower=lower_all_reduce_add_norm,
    ),
)
