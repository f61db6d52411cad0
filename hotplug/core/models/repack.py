"""Weights as the chosen kernels read them: after loading, a platform (`HasWeights`) rearranges each once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hotplug.core.errors import PlatformError
from hotplug.core.interface_1 import repacker
from hotplug.core.layers.dense import Linear, LinearSiluMul, PackedLinearSiluMul, QuantizedLinear
from hotplug.core.layers.table import Head
from hotplug.core.models.decoder import Decoder
from hotplug.core.ops.plan import COMPOSED, Choice, Plan
from hotplug.core.platform.optional import HasWeights
from hotplug.core.weights.checkpoint import Checkpoint


@torch.no_grad()
def repack_weights(model: Decoder, plan: Plan, platform: HasWeights, checkpoint: Checkpoint) -> None:
    """Give every product's weight that one kernel alone reads to the platform, and let go of what it was.

    A site that several kernels serve by shape, or a reference, keeps its weight; one whose op was lowered has it
    repacked for the part that reads it. An embedding keeps its matrix, so that a head which is tied to it gets one of
    its own. Weights may be views of `checkpoint`'s files, which are let go of one by one: what is mapped and what is
    made of it are never there in full together. Raises PlatformError where tensors are missing from what comes back.
    """
    repack = repacker(platform)
    choices = {choice.spec.site: choice for choice in plan.choices}
    for sites, owner, names in _weights(model):
        reader = next((choices[site] for site in sites if choices[site].provider != COMPOSED), None)
        if reader is None or not _one_kernel(plan, reader):
            continue
        weight: list[Tensor] = [getattr(owner, name) for name in names]
        packed = repack(weight, reader.spec, reader.provider)
        if isinstance(packed, Tensor) or len(packed) != len(weight):
            raise PlatformError(f"repack gives something else than the {len(weight)} tensors of a weight",
                                where=f"{reader.provider} at {reader.spec.site}")  # fmt: skip
        new = [(name, after) for name, before, after in zip(names, weight, packed, strict=True) if after is not before]
        for name, tensor in new:
            setattr(owner, name, nn.Parameter(tensor, requires_grad=False))
        if new:
            checkpoint.release()


def _weights(model: nn.Module) -> Iterator[tuple[tuple[str, ...], nn.Module, list[str]]]:
    """Of every product's weight: the call sites that may read it, the parts of a lowered op last, owner, attributes."""
    for module in model.modules():
        if isinstance(module, LinearSiluMul | PackedLinearSiluMul):
            yield (module.site, f"{module.site}.linear"), module, ["weight"]
        elif isinstance(module, Linear | Head):
            yield (module.site,), module, ["weight"]
        elif isinstance(module, QuantizedLinear):
            yield (module.site,), module.stored, [str(i) for i in range(len(module.stored))]


def _one_kernel(plan: Plan, choice: Choice) -> bool:
    return any(impl.provider == choice.provider for impl in plan.registry.impls(choice.spec.op))
