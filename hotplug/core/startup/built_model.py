"""A stage of a start: the model, built with its ops bound and its weights not yet read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hotplug.core.layers.context import BuildContext
from hotplug.core.models.decoder import Decoder
from hotplug.core.models.loader import build_model
from hotplug.core.ops.dtypes import TORCH_DTYPES
from hotplug.core.platform.base import ExecMode
from hotplug.core.runner import memory_guard
from hotplug.core.runner.memory_guard import MemoryGuard
from hotplug.core.startup.compile_check import compiled_by
from hotplug.core.startup.kernel_plan import Kernels
from hotplug.core.startup.kv_plan import KVPlan
from hotplug.core.startup.placement import Placement
from hotplug.core.startup.settle import Options
from hotplug.core.weights.config import ModelConfig


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """One rank's part of a model."""

    decoder: Decoder
    context: BuildContext
    """What it was built with."""
    compiled_by: Mapping[str, str]
    """By call site, what computes it in compiled steps, where the platform says that its kernel does not."""


def build(
    config: ModelConfig,
    models: Mapping[str, type[Decoder]],
    placement: Placement,
    options: Options,
    kernels: Kernels,
    kv: KVPlan,
) -> BuiltModel:
    """Build a rank's part of the model; `models` are the classes by architecture.

    Raises ModelError, OutOfMemoryError, and PlatformError where the platform cannot compile its steps.
    """
    resolved, weights, group = options.resolved, kernels.weights, placement.tensor_group
    context = BuildContext(
        plan=kernels.plan,
        dtype=TORCH_DTYPES[resolved.dtype],
        device=placement.torch_device,
        kv=kv.groups,
        static_steps=resolved.static_steps,
        scheme=weights.scheme,
        table_scheme=weights.table_scheme,
        site_schemes=weights.site_schemes,
        max_position=kv.reach,
        rank=group.position,
        ranks=group.size,
    )
    with MemoryGuard("making room for the weights", placement.selection, memory_guard.WEIGHTS):
        decoder = build_model(config, context, models)
    compiles = resolved.exec_mode is ExecMode.COMPILE
    whole = compiled_by(placement.platform, kernels.plan.choices) if compiles else {}
    return BuiltModel(decoder, context, whole)
