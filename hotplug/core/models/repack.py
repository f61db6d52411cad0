"""Matrices as the chosen kernels read them: after loading, a platform (`HasWeights`) rearranges each once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from hotplug.core.layers.dense import Linear, LinearSiluMul, PackedLinearSiluMul, QuantizedLinear
from hotplug.core.layers.table import Head
from hotplug.core.models.decoder import Decoder
from hotplug.core.ops.plan import Choice, Plan
from hotplug.core.platform.optional import HasWeights
from hotplug.core.weights.checkpoint import Checkpoint


@torch.no_grad()
def repack_weights(model: Decoder, plan: Plan, platform: HasWeights, checkpoint: Checkpoint) -> None:
    """Give every matrix that one kernel alone reads to the platform, and let go of what it was.

    A site that several kernels serve by shape, or a reference or parts of the op, keeps its matrix; an embedding does
    as well, so that a head which is tied to it gets a matrix of its own. Matrices may be views of `checkpoint`'s
    files, which are let go of one by one: what is mapped and what is made of it are never there in full together.
    """
    choices = {choice.spec.site: choice for choice in plan.choices}
    for site, owner, name in _matrices(model):
        if _one_kernel(plan, choices[site]):
            weight = getattr(owner, name)
            packed = platform.repack(weight, choices[site].spec, choices[site].provider)
            if packed is not weight:
                setattr(owner, name, nn.Parameter(packed, requires_grad=False))
                checkpoint.release()


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Call site, owner and attribute of every matrix that products read."""
    for module in model.modules():
        if isinstance(module, Linear | LinearSiluMul | PackedLinearSiluMul | Head):
            yield module.site, module, "weight"
        elif isinstance(module, QuantizedLinear) and len(module.stored) == 1:
            yield module.site, module.stored, "0"


def _one_kernel(plan: Plan, choice: Choice) -> bool:
    return any(impl.provider == choice.provider for impl in plan.registry.impls(choice.spec.op))
