"""From a configuration to a bound model: device chosen, options settled, plan made; no weight read yet.

One stage after the other, each a file of its own that returns a small record; `Bound` is these records. `hotplug
explain` stops here, with the model on torch's meta device; an engine goes on to load (`start`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import hotplug
from hotplug.core.config import EngineConfig
from hotplug.core.extension.points import Extension
from hotplug.core.models.split import local_config
from hotplug.core.ops.registry import Observe
from hotplug.core.platform.discovery import Candidate, discover
from hotplug.core.scheduler.policy import SchedulingPolicy
from hotplug.core.startup.built_model import BuiltModel, build
from hotplug.core.startup.installed import gather
from hotplug.core.startup.kernel_plan import Kernels, open_plan
from hotplug.core.startup.kv_plan import KVPlan, bind_block_copy, check_kv, plan_kv
from hotplug.core.startup.placement import Placement, choose_device
from hotplug.core.startup.settle import Options, settle
from hotplug.core.startup.step_rows import Rows, make_rows
from hotplug.core.startup.weight_format import asked_format
from hotplug.core.transfer.connector import KVConnector, KVFormat
from hotplug.core.weights.checkpoint import Checkpoint, open_checkpoint
from hotplug.core.weights.read_ahead import read_ahead
from hotplug.core.weights.source import resolve as resolve_source

MakeConnector = Callable[[KVFormat], KVConnector]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A model with its kernels chosen, and what every stage decided on the way."""

    config: EngineConfig
    placement: Placement
    checkpoint: Checkpoint
    options: Options
    kernels: Kernels
    kv: KVPlan
    model: BuiltModel
    rows: Rows
    policy: SchedulingPolicy
    connector: MakeConnector | None
    """Makes what keeps KV blocks elsewhere."""

    def report(self) -> dict[str, Any]:
        """The plan and its surroundings as plain data (`hotplug explain --json`, `GET /debug/plan`)."""
        placement, resolved, plan, kv = self.placement, self.options.resolved, self.kernels.plan, self.kv
        device, compiled_by = placement.device, self.model.compiled_by
        return {
            "schema": 1,
            "hotplug": hotplug.__version__,
            "model": self.config.model_name,
            "architecture": self.checkpoint.config.architecture,
            "platform": placement.platform.name,
            "device": {"name": device.name, "arch": device.arch, "index": device.index},
            "selected_because": placement.selection.reason,
            "torch": str(torch.__version__),
            "dtype": resolved.dtype,
            "quantization": self.kernels.weights.name,
            "quantization_because": self.kernels.weights.reason,
            "exec": str(resolved.exec_mode),
            "exec_because": self.options.mode_reason,
            "step": {
                "requests": resolved.max_num_seqs,
                "tokens": resolved.max_num_batched_tokens,
                "because": self.options.step_reason,
            },
            "ranks": placement.mesh.size,
            "kv": {
                "dtype": resolved.kv_dtype,
                "layout": str(resolved.kv_layout),
                "block_size": resolved.block_size,
                "block_bytes": kv.block_bytes,
                "groups": kv.report(),
                "lanes": kv.groups.lanes,
                "swap_blocks": kv.swap_blocks,
                "shared_host_memory": placement.limits.shared_host_memory,
            },
            "max_model_len": self.options.max_model_len,
            "plan_hash": plan.hash,
            "reference_sites": len(plan.reference_sites),
            "sites": [{**site, "compiled_by": compiled_by.get(site["site"], "")} for site in plan.report()],
        }


def bind(
    config: EngineConfig,
    *,
    meta: bool = False,
    observe: Observe | None = None,
    candidates: Sequence[Candidate] | None = None,
    rank: int = 0,
) -> Bound:
    """Choose the device, check the configuration against it, and bind every call site of the model, as `rank` has it.

    With `meta` no memory is taken. `observe` stands in front of every bound callable. `candidates` are the platforms
    to choose from (default: all that are installed). Raises ConfigError,
    PlatformError, FeatureError, SourceError, ModelError, PlanError or OutOfMemoryError.
    """
    placement = choose_device(config, discover() if candidates is None else candidates, rank, meta=meta)
    extension = gather()
    policy: SchedulingPolicy = extension.find("scheduling", config.scheduling, option="--scheduling")
    connector = _connector(config, extension)

    checkpoint = _open(config, extension, ahead=not meta)
    asked = asked_format(config, extension, checkpoint)
    options = settle(
        config, placement, checkpoint.config, models=extension.models, asked=asked, observed=observe is not None
    )
    own = local_config(checkpoint.config, placement.mesh.tp)  # of what this rank computes

    kernels = open_plan(config, placement, options, checkpoint, extension, asked=asked, observe=observe)
    kv = plan_kv(config, placement, options, own, extension.models)
    if not meta:
        check_kv(config, placement, options, kv, own.head_dim)
    model = build(own, extension.models, placement, options, kernels, kv)
    rows = make_rows(placement, options.resolved, kernels.plan, extension.logits_processors, reach=kv.reach,
                     num_tables=kv.groups.num_tables, vocab=own.vocab_size)  # fmt: skip
    kv = bind_block_copy(kv, kernels.plan, options.resolved)
    kernels.plan.finish()
    return Bound(config=config, placement=placement, checkpoint=checkpoint, options=options, kernels=kernels, kv=kv,
                 model=model, rows=rows, policy=policy, connector=connector)  # fmt: skip


def _open(config: EngineConfig, extension: Extension, *, ahead: bool) -> Checkpoint:
    """Find the checkpoint and read its headers; with `ahead`, have the system read the rest in the background."""
    path = resolve_source(config.model)
    checkpoint = open_checkpoint(path, config.load_format, config.seed, extension.models, extension.config_readers)
    if ahead:
        read_ahead(checkpoint.files)
    return checkpoint


def _connector(config: EngineConfig, extension: Extension) -> MakeConnector | None:
    if config.kv_connector is None:
        return None
    name, _, argument = config.kv_connector.partition(":")
    factory = extension.find("kv_connectors", name, option="--kv-connector")
    return lambda kv_format: factory(argument, kv_format)
