"""What every layer is built with: the plan to bind ops from, and how tensors are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from hotplug.core.kv.groups import KVGroups
from hotplug.core.ops.registry import Fact, Fn
from hotplug.core.quant.packed_scheme import PackedScheme
from hotplug.core.quant.scheme import QuantScheme


class Binder(Protocol):
    """What binds a layer's ops: the plan, or what makes nodes of them."""

    def bind(self, op: str, site: str, dtype: str, **facts: Fact) -> Fn: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """Shared by all layers of one model."""

    plan: Binder
    dtype: torch.dtype
    device: torch.device
    kv: KVGroups
    """What the layers keep of a sequence, and where."""
    static_steps: bool = False
    """Whether steps may run in static shapes, where kernels cannot read lengths on the host."""
    scheme: QuantScheme | None = None
    """How linear layers store their weights; None is plain floating point."""
    table_scheme: PackedScheme | None = None
    """How the embedding and the head store theirs."""
    site_schemes: Mapping[str, PackedScheme | None] = field(default_factory=dict)
    """Of call sites whose matrix is stored otherwise than these two say."""
    max_position: int
    """Positions the rotary table must cover."""
    rank: int = 0
    ranks: int = 1
    """Which of how many ranks the model is built for; each has its part of every layer."""

    def bind(self, op: str, site: str, **facts: Fact) -> Fn:
        """The planned callable of `op` at `site` for this model's compute dtype."""
        return self.plan.bind(op, site, dtype_name(self.dtype), **facts)

    def scheme_at(self, site: str) -> QuantScheme | None:
        """How the linear layer of a call site stores its weights."""
        return self.site_schemes.get(site, self.scheme)

    def table_scheme_at(self, site: str) -> PackedScheme | None:
        """How the embedding or the head stores its table."""
        return self.site_schemes.get(site, self.table_scheme)

    def weight(self, *shape: int) -> nn.Parameter:
        """An uninitialized parameter; loading must fill all of it."""
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device), requires_grad=False)


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> "float32"."""
    return str(dtype).removeprefix("torch.")
