"""The collectives of an engine as kernels of its plan: the platform's own (`HasComm`), else torch.distributed's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hotplug.core.ops.collective import all_gather, all_reduce
from hotplug.core.ops.registry import Impl, OpRegistry, SiteSpec
from hotplug.core.platform.base import Platform
from hotplug.core.platform.optional import HasComm, NotHandledType
from hotplug.core.platform.rank_group import RankGroup

Collective = Callable[[Tensor], Tensor]
TORCH = "torch.distributed"
"""Provider of the collectives where the platform has none."""


def register_collectives(registry: OpRegistry, platform: Platform, group: RankGroup) -> None:
    """Add the kernels of `all_reduce` and `all_gather` over a group, which is the default one of torch.distributed."""
    own = isinstance(platform, HasComm)
    for name, default in (("all_reduce", all_reduce), ("all_gather", all_gather)):
        times = group.size if name == "all_gather" else 1
        registry.add(Impl(name, TORCH, make=_skipped_on_meta(default, times)))
        if own:
            make = _skipped_on_meta(_either(getattr(platform, name), default, group), times)
            registry.add(Impl(name, f"{platform.name}.comm", make=make, rank=2))


def _either(
    method: Callable[[Tensor, RankGroup], Tensor | NotHandledType], default: Collective, group: RankGroup
) -> Collective:
    """The platform's collective; torch.distributed's for a size that it does not handle."""

    def call(x: Tensor) -> Tensor:
        found = method(x, group)
        return default(x) if isinstance(found, NotHandledType) else found

    return call


def _skipped_on_meta(fn: Collective, times: int) -> Callable[[SiteSpec], Collective]:
    """Makes `fn`, but not called for tensors without memory, whose steps one rank runs by itself: wider by `times`."""

    def call(x: Tensor) -> Tensor:
        return x.repeat(1, times) if x.is_meta else fn(x)

    return lambda _: call
