"""Which executable runs an engine's steps: op by op, captured or compiled, as its configuration settled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import hotplug
from hotplug.core.errors import PlatformError
from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.platform.base import ExecMode
from hotplug.core.platform.optional import HasCapture, HasCompile
from hotplug.core.runner.artifacts import artifact_folder, source_hash
from hotplug.core.runner.capture import CapturedSteps, decode_shapes, decode_shapes_on_use
from hotplug.core.runner.capture_prompts import CHUNKS, PromptShape, prompt_shapes
from hotplug.core.runner.compile import Compiled, CompiledSteps, StepBounds, checked_shapes
from hotplug.core.runner.dynamic import DynamicInputs
from hotplug.core.runner.executable import EagerStep, Executable
from hotplug.core.runner.program import ExportedStep, ModelProgram
from hotplug.core.runner.static import StaticInputs, StepShape
from hotplug.core.scheduler.config import MOST_SCORED, ShortPrompts
from hotplug.core.startup.bind import Bound
from hotplug.core.weights.source import cache_folder


@dataclass(frozen=True, slots=True)
class CompiledShapes:
    """The shapes of steps that are to be compiled."""

    shapes: Sequence[StepShape]
    """Smallest first."""
    bounds: StepBounds
    """What they allow a step to hold."""


def compiled_shapes(bound: Bound) -> CompiledShapes | None:
    """What to compile; None where nothing is. Raises PlatformError for buckets that leave a step unserved."""
    resolved, limits, platform = bound.options.resolved, bound.placement.limits, bound.placement.platform
    if resolved.exec_mode is not ExecMode.COMPILE:
        return None
    if not isinstance(platform, HasCompile):
        raise PlatformError("the platform declares compile but has not all of HasCompile", where=platform.name)
    seqs = resolved.max_num_seqs
    tokens = min(resolved.max_num_batched_tokens, max(bound.options.max_model_len, seqs))
    shapes, bounds = checked_shapes(
        platform.buckets(tokens, seqs),
        max_num_seqs=seqs,
        max_shapes=limits.max_graph_shapes,
        mixed_steps=limits.mixed_steps,
        dynamic=limits.compiled.dynamic,
        where=f"{platform.name}.buckets({tokens}, {seqs})",
    )
    return CompiledShapes(shapes, bounds)


def captured_shapes(bound: Bound) -> list[StepShape]:
    """The shapes to record, smallest first; none where nothing is recorded."""
    resolved, limits, rows = bound.options.resolved, bound.placement.limits, bound.rows.batch.spare_row
    if resolved.exec_mode is not ExecMode.CAPTURE:
        return []
    if limits.capture_on_use:
        verified = MOST_SCORED if resolved.speculates else 0
        return decode_shapes_on_use(max(rows, verified))
    return decode_shapes(rows, limits.max_graph_shapes)


def captured_prompts(bound: Bound) -> list[PromptShape]:
    """The shapes of steps with prompt chunks to record, smallest first."""
    resolved, limits = bound.options.resolved, bound.placement.limits
    if resolved.exec_mode is not ExecMode.CAPTURE or not limits.mixed_steps:
        return []
    most = min(limits.capture_prompt_tokens, resolved.max_num_batched_tokens, bound.kv.reach)
    return prompt_shapes(bound.rows.batch.spare_row, most)


def short_prompts(bound: Bound) -> ShortPrompts | None:
    """The most of prompts that a recorded step holds; None where none is recorded with prompts."""
    shapes = captured_prompts(bound)
    return ShortPrompts(shapes[-1].tokens, CHUNKS) if shapes else None


def make_executable(bound: Bound, kv: list[KVBlocks], compiles: CompiledShapes | None) -> Executable:
    """What runs the steps over the caches `kv`. `compiles` are the shapes to compile."""
    eager = EagerStep(bound.model.decoder, kv, bound.rows.batch)
    if compiles is not None:
        return compiled(bound, compiles.shapes, kv, eager)
    if bound.options.resolved.exec_mode is ExecMode.CAPTURE:
        return captured(bound, eager, captured_shapes(bound), captured_prompts(bound))
    return eager


def captured(
    bound: Bound,
    eager: EagerStep,
    shapes: Sequence[StepShape],
    prompts: Sequence[PromptShape] = (),
    recorded: Callable[[], object] = lambda: None,
) -> CapturedSteps:
    """Recorded steps of these shapes; `recorded` is called after each recorded now."""
    platform, device = bound.placement.platform, bound.placement.device
    if not isinstance(platform, HasCapture):
        raise PlatformError("the platform declares capture but has no `capture` method", where=platform.name)
    on_use = bound.placement.limits.capture_on_use
    return CapturedSteps(eager, bound.rows.batch, bound.rows.sampler, platform, device, shapes, recorded,
                         on_use=on_use, prompts=prompts)  # fmt: skip


def graph_memory(bound: Bound, scratch: list[KVBlocks]) -> int:
    """Bytes that recording all steps will take, from a trial with the two largest of each kind over a scratch cache.

    Recorded steps share their memory, so that each smaller one adds about what the second largest of its kind did.
    """
    shapes, prompts = captured_shapes(bound), captured_prompts(bound)
    if not shapes or bound.placement.limits.capture_on_use:  # those run in memory that the largest steps had too
        return 0
    platform, device = bound.placement.platform, bound.placement.device
    free = [platform.memory(device).free]
    eager = EagerStep(bound.model.decoder, scratch, bound.rows.batch)
    trial = captured(bound, eager, shapes[-2:], prompts[-2:], lambda: free.append(platform.memory(device).free))
    trial.release()
    more, after = 0, 0
    for kind in (prompts, shapes):
        after += len(kind[-2:])
        if len(kind) > 2:
            more += max(free[after - 1] - free[after], 0) * (len(kind) - 2)
    return max(free[0] - free[-1], 0) + more


def compiled(bound: Bound, shapes: Sequence[StepShape], kv: list[KVBlocks], eager: EagerStep) -> CompiledSteps:
    """Compiled steps of these shapes; op-by-op ones serve meanwhile where the platform has them."""
    platform, device = bound.placement.platform, bound.placement.device
    assert isinstance(platform, HasCompile)
    programs = ModelProgram(bound.model.decoder, bound.model.context, bound.kernels.plan, kv)
    tables, limits = bound.rows.batch.block_tables, bound.placement.limits
    root = cache_folder() / "compiled" / platform.name
    facts = _program_facts(bound, kv, platform.fingerprint())

    def compile_shape(inputs: StaticInputs | DynamicInputs) -> Compiled:
        folder = artifact_folder(root, {**facts, "shape": list(inputs.shape)})
        return platform.compile(ExportedStep(programs, inputs), device, folder)

    kind = DynamicInputs if limits.compiled.dynamic else StaticInputs
    return CompiledSteps(
        platform,
        compile_shape,
        [
            kind(
                shape,
                num_tables=len(tables),
                max_blocks=tables.shape[2],
                index_dtype=tables.dtype,
                device=tables.device,
            )
            for shape in shapes
        ],
        kv,
        bound.rows.batch,
        eager if ExecMode.EAGER in limits.exec_modes else None,
    )


def _program_facts(bound: Bound, kv: Sequence[KVBlocks], fingerprint: str) -> dict[str, object]:
    """Everything that the programs of an engine follow from, but for their shapes."""
    tables, plan, resolved = bound.rows.batch.block_tables, bound.kernels.plan, bound.options.resolved
    layers = {type(module).__module__ for module in bound.model.decoder.modules()}
    cache = list(kv[0][0].shape)
    if bound.placement.limits.compiled.dynamic:
        cache[0] = -1  # the number of blocks varies
    ops = {plan.registry.op(choice.spec.op).reference.__module__ for choice in plan.choices}
    return {
        "hotplug": hotplug.__version__,
        "source": source_hash(name for name in layers | ops if not name.startswith("torch.")),
        "torch": str(torch.__version__),
        "platform": bound.placement.platform.name,
        "fingerprint": fingerprint,
        "arch": bound.placement.device.arch,
        "plan": plan.hash,
        "model": dataclasses.asdict(bound.checkpoint.config),
        "max_position": bound.kv.reach,
        "dtype": resolved.dtype,
        "kv": [str(kv[0][0].dtype), str(resolved.kv_layout), cache],
        "block_table": [str(tables.dtype), len(tables), tables.shape[2]],
    }
