"""A stage of a start: in which format the weights are kept, and the plan that binds every call site to a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from hotplug.core.config import EngineConfig
from hotplug.core.extension.points import Extension
from hotplug.core.interface_1 import register
from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.plan import Plan
from hotplug.core.ops.registry import Observe, OpRegistry
from hotplug.core.ops.trace import Tracer, synchronizer
from hotplug.core.parallel.comm import register_collectives
from hotplug.core.quant.packed_scheme import PackedScheme
from hotplug.core.startup.placement import Placement
from hotplug.core.startup.ranks import packed_split_faults
from hotplug.core.startup.settle import Options
from hotplug.core.startup.weight_format import WeightFormat, preferred_format
from hotplug.core.weights.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Kernels:
    """What computes, and on weights in which format."""

    weights: WeightFormat
    plan: Plan
    """Empty until the model, the batch and the sampler bind their call sites."""
    tracer: Tracer | None
    """Times every call, where the configuration asks for it."""
    observed: bool
    """Whether somebody else looks at every call."""


def open_plan(
    config: EngineConfig,
    placement: Placement,
    options: Options,
    checkpoint: Checkpoint,
    extension: Extension,
    *,
    asked: WeightFormat | None,
    observe: Observe | None,
) -> Kernels:
    """A plan to bind call sites in.

    `asked` is the weight format that the configuration names, None where it names none. `observe` stands in front of
    every bound callable. Raises PlatformError.
    """
    registry = _registry(placement, extension, asked)
    weights = asked or preferred_format(
        placement.limits,
        registry,
        checkpoint,
        dtype=options.resolved.dtype,
        arch=placement.device.arch,
        split_faults=packed_split_faults(checkpoint.config, placement.mesh.tp),
    )
    tracer = None
    if config.trace_ops:
        tracer = Tracer(synchronizer(placement.platform, placement.device, placement.torch_device))
    plan = Plan(
        registry,
        arch=placement.device.arch,
        force=config.force,
        accelerator=placement.limits.accelerator,
        observe=tracer.observe if observe is None and tracer is not None else observe,
    )
    return Kernels(weights, plan, tracer, observe is not None)


def _registry(placement: Placement, extension: Extension, asked: WeightFormat | None) -> OpRegistry:
    """The built-in ops, those of the packages, and the platform's kernels."""
    registry = builtin_registry()
    for op in extension.ops:
        registry.define(op)
    if asked is not None and asked.scheme is not None and not isinstance(asked.scheme, PackedScheme):
        registry.define(asked.scheme.op)  # that of packed weights is built in
    register(placement.platform, registry)
    if placement.tensor_group.size > 1:
        register_collectives(registry, placement.platform, placement.tensor_group)
    return registry
