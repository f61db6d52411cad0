"""From a configuration to a bound model: device chosen, options settled, plan made; no weight read yet.

`hotplug explain` stops here, with the model on torch's meta device; an engine goes on to load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import hotplug
from hotplug.core.config import EngineConfig, parse_bytes
from hotplug.core.errors import ConfigError
from hotplug.core.extension.points import Extension
from hotplug.core.interface_1 import register
from hotplug.core.layers.context import BuildContext
from hotplug.core.models.decoder import Decoder
from hotplug.core.models.loader import build_model
from hotplug.core.models.split import local_config
from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.plan import Plan
from hotplug.core.ops.registry import Observe, OpRegistry
from hotplug.core.ops.trace import Tracer, synchronizer
from hotplug.core.parallel.comm import register_collectives
from hotplug.core.platform.base import ExecMode, Limits, Platform
from hotplug.core.platform.discovery import Candidate, discover
from hotplug.core.platform.features import Resolved, compute_dtype, resolve
from hotplug.core.platform.optional import HasRuntime
from hotplug.core.platform.select import Selection, select
from hotplug.core.quant.packed_scheme import PackedScheme
from hotplug.core.runner import kv_memory, memory_guard
from hotplug.core.runner.device_batch import DeviceBatch
from hotplug.core.runner.kv_memory import KVShape, swap_blocks, torch_device
from hotplug.core.runner.memory_guard import MemoryGuard
from hotplug.core.sample.sampler import Sampler
from hotplug.core.scheduler.policy import SchedulingPolicy
from hotplug.core.startup import mode_record, step_record
from hotplug.core.startup.compile_check import compiled_by
from hotplug.core.startup.installed import gather
from hotplug.core.startup.ranks import check_ranks, device_of_rank, packed_split_faults
from hotplug.core.startup.step_record import StepSize
from hotplug.core.startup.weight_format import WeightFormat, asked_format, preferred_format
from hotplug.core.transfer.connector import KVConnector, KVFormat
from hotplug.core.transfer.swap import BlockCopy
from hotplug.core.weights.checkpoint import Checkpoint, open_checkpoint
from hotplug.core.weights.config import ModelConfig
from hotplug.core.weights.read_ahead import read_ahead
from hotplug.core.weights.source import resolve as resolve_source

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "int32": torch.int32,
    "int64": torch.int64,
}


@dataclass(frozen=True, slots=True)
class Bound:
    """A model with its kernels chosen, and everything that was decided on the way."""

    config: EngineConfig
    selection: Selection
    limits: Limits
    resolved: Resolved
    mode_reason: str
    """Why steps run in `resolved.exec_mode`."""
    step_reason: str
    """Why a step holds as many requests and tokens as `resolved` says."""
    checkpoint: Checkpoint
    weights: WeightFormat
    max_model_len: int
    plan: Plan
    context: BuildContext
    """What the model was built with."""
    model: Decoder
    batch: DeviceBatch
    sampler: Sampler
    kv_shape: KVShape
    policy: SchedulingPolicy
    connector: Callable[[KVFormat], KVConnector] | None
    """Makes what keeps KV blocks elsewhere."""
    tracer: Tracer | None
    """Times every call, where the configuration asks for it."""
    swap_blocks: int
    """Blocks of the swap space on the host, the null block among them; 0 without one."""
    block_copy: BlockCopy | None
    """The op that gathers and scatters them; None without a swap space."""
    sharing: int
    """Ranks on the rank's device, itself among them."""
    compiled_by: Mapping[str, str]
    """By call site, what computes it in compiled steps, where the platform says that its kernel does not."""

    def report(self) -> dict[str, Any]:
        """The plan and its surroundings as plain data (`hotplug explain --json`, `GET /debug/plan`)."""
        selection = self.selection
        return {
            "schema": 1,
            "hotplug": hotplug.__version__,
            "model": self.config.model_name,
            "architecture": self.checkpoint.config.architecture,
            "platform": selection.platform.name,
            "device": {"name": selection.device.name, "arch": selection.device.arch, "index": selection.device.index},
            "selected_because": selection.reason,
            "torch": str(torch.__version__),
            "dtype": self.resolved.dtype,
            "quantization": self.weights.name,
            "quantization_because": self.weights.reason,
            "exec": str(self.resolved.exec_mode),
            "exec_because": self.mode_reason,
            "step": {
                "requests": self.resolved.max_num_seqs,
                "tokens": self.resolved.max_num_batched_tokens,
                "because": self.step_reason,
            },
            "ranks": self.context.ranks,
            "kv": {
                "dtype": self.resolved.kv_dtype,
                "layout": str(self.resolved.kv_layout),
                "block_size": self.resolved.block_size,
                "block_bytes": self.kv_shape.block_bytes,
                "swap_blocks": self.swap_blocks,
                "shared_host_memory": self.limits.shared_host_memory,
            },
            "max_model_len": self.max_model_len,
            "plan_hash": self.plan.hash,
            "reference_sites": len(self.plan.reference_sites),
            "sites": [{**site, "compiled_by": self.compiled_by.get(site["site"], "")} for site in self.plan.report()],
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
    ranks = config.tensor_parallel_size
    first = select(config.device, discover() if candidates is None else candidates)
    selection, sharing = device_of_rank(first, rank, ranks)
    limits = selection.platform.limits(selection.device)
    extension = gather()
    policy = extension.find("scheduling", config.scheduling, option="--scheduling")
    connector = _connector(config, extension)
    path = resolve_source(config.model)
    checkpoint = open_checkpoint(path, config.load_format, config.seed, extension.models, extension.config_readers)
    if not meta:
        read_ahead(checkpoint.files)
    model_config = checkpoint.config
    asked = asked_format(config, extension, checkpoint)
    mode = mode_record.choose(config, selection, model_config, limits.exec_modes)
    step = _step_size(config, selection, limits, model_config)
    resolved = resolve(config, limits, platform=selection.platform.name, checkpoint_dtype=model_config.dtype,
                       fastest=mode.mode, step_requests=step.requests, step_tokens=step.tokens)  # fmt: skip
    check_ranks(config, model_config, extension.models, asked, first, observed=observe is not None)
    model_config = local_config(model_config, ranks)
    max_model_len = _max_model_len(config, model_config)

    registry = _registry(selection.platform, extension, asked, ranks)
    weights = asked or preferred_format(limits, registry, checkpoint, dtype=resolved.dtype, arch=selection.device.arch,
                                        split_faults=packed_split_faults(checkpoint.config, ranks))  # fmt: skip
    device = torch.device("meta") if meta else torch_device(selection.platform, selection.device)
    tracer = Tracer(synchronizer(selection.platform, selection.device, device)) if config.trace_ops else None
    observe = tracer.observe if observe is None and tracer is not None else observe
    plan = Plan(registry, arch=selection.device.arch, force=config.force, accelerator=limits.accelerator,
                observe=observe)  # fmt: skip
    kv_shape = KVShape(model_config.num_layers, model_config.num_kv_heads, model_config.head_dim, resolved.block_size,
                       resolved.kv_layout, TORCH_DTYPES[resolved.kv_dtype])  # fmt: skip
    reach = min(max_model_len, _reachable(config, model_config, kv_shape, resolved, max_model_len, sharing))
    if not meta:
        kv_memory.check_context(config, limits, selection.platform.memory(selection.device), kv_shape, reach, sharing)
    context = BuildContext(
        plan=plan,
        dtype=TORCH_DTYPES[resolved.dtype],
        device=device,
        block_size=resolved.block_size,
        kv_layout=str(resolved.kv_layout),
        kv_dtype=resolved.kv_dtype,
        static_steps=resolved.static_steps,
        scheme=weights.scheme,
        table_scheme=weights.table_scheme,
        site_schemes=weights.site_schemes,
        max_position=reach,
        rank=rank,
        ranks=ranks,
    )
    with MemoryGuard("making room for the weights", selection, memory_guard.WEIGHTS):
        model = build_model(model_config, context, extension.models)
    whole = compiled_by(selection.platform, plan.choices) if resolved.exec_mode is ExecMode.COMPILE else {}
    batch = _batch(plan, selection, limits, resolved, device, reach)
    with MemoryGuard("making room for the sampler", selection, memory_guard.SAMPLER):
        sampler = Sampler(plan, resolved.max_num_seqs, model_config.vocab_size, device, extension.logits_processors,
                          speculates=resolved.speculates)  # fmt: skip
    host_blocks = swap_blocks(kv_shape, config)
    block_copy = _bind_swap(plan, kv_shape, resolved) if host_blocks else None
    plan.finish()
    return Bound(
        config,
        selection,
        limits,
        resolved,
        mode.reason,
        step.reason,
        checkpoint,
        weights,
        max_model_len,
        plan,
        context,
        model,
        batch,
        sampler,
        kv_shape,
        policy,
        connector,
        tracer,
        host_blocks,
        block_copy,
        sharing,
        whole,
    )


def _step_size(config: EngineConfig, selection: Selection, limits: Limits, model: ModelConfig) -> StepSize:
    dtype = TORCH_DTYPES[compute_dtype(config, limits, model.dtype)]
    return step_record.choose(config, selection, model, dtype.itemsize)


def _registry(platform: Platform, extension: Extension, asked: WeightFormat | None, ranks: int) -> OpRegistry:
    """The built-in ops, those of the packages, and the platform's kernels."""
    registry = builtin_registry()
    for op in extension.ops:
        registry.define(op)
    if asked is not None and asked.scheme is not None and not isinstance(asked.scheme, PackedScheme):
        registry.define(asked.scheme.op)  # that of stored groups is built in
    register(platform, registry)
    if ranks > 1:
        register_collectives(registry, platform, ranks)
    return registry


def _batch(
    plan: Plan, selection: Selection, limits: Limits, resolved: Resolved, device: torch.device, reach: int
) -> DeviceBatch:
    """The rows of a step, each of up to `reach` tokens. Raises OutOfMemoryError."""
    platform = selection.platform
    with MemoryGuard("making room for the rows of a step", selection, memory_guard.ROWS):
        return DeviceBatch(
            plan,
            max_rows=resolved.max_num_seqs,
            max_len=reach,
            block_size=resolved.block_size,
            index_dtype=TORCH_DTYPES[limits.index_dtype],
            device=device,
            pin=platform.pinned if isinstance(platform, HasRuntime) and device.type != "meta" else None,
        )


def _bind_swap(plan: Plan, shape: KVShape, resolved: Resolved) -> BlockCopy:
    return plan.bind("block_copy", "swap", resolved.dtype, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
                     block_size=shape.block_size, layout=str(shape.layout), kv_dtype=resolved.kv_dtype)  # fmt: skip


def _connector(config: EngineConfig, extension: Extension) -> Callable[[KVFormat], KVConnector] | None:
    if config.kv_connector is None:
        return None
    name, _, argument = config.kv_connector.partition(":")
    factory = extension.find("kv_connectors", name, option="--kv-connector")
    return lambda kv_format: factory(argument, kv_format)


def _reachable(
    config: EngineConfig, model: ModelConfig, shape: KVShape, resolved: Resolved, max_model_len: int, sharing: int
) -> int:
    """Positions that a sequence can reach in the KV cache that the user allows; `max_model_len` where he sets none."""
    if config.kv_cache_memory is None:
        return max_model_len
    blocks = parse_bytes(config.kv_cache_memory) // sharing // shape.block_bytes
    peak = kv_memory.group(model, shape.block_size).peak_blocks(max_model_len, resolved.max_num_batched_tokens)
    # One more than fits, so that it is the cache that a longer prompt is refused for, and not the context.
    return max_model_len if peak < blocks else blocks * shape.block_size + 1


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is None:
        return model.max_position
    if config.max_model_len > model.max_position:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is above the model's own {model.max_position} positions",
            hint="Lower --max-model-len or leave it out.",
        )
    return config.max_model_len
