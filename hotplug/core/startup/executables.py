"""Which executable runs an engine's steps: op by op, captured or compiled, as its configuration settled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

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
from hotplug.core.runner.executable import EagerStep
from hotplug.core.runner.program import ExportedStep, ModelProgram
from hotplug.core.runner.static import StaticInputs, StepShape
from hotplug.core.scheduler.config import MOST_SCORED, ShortPrompts
from hotplug.core.startup.bind import Bound
from hotplug.core.weights.source import cache_folder


def compiled_shapes(bound: Bound) -> tuple[list[StepShape], StepBounds] | None:
    """The shapes to compile and what they allow a step to hold; None where nothing is compiled.

    Raises PlatformError for buckets that leave a step unserved.
    """
    if bound.resolved.exec_mode is not ExecMode.COMPILE:
        return None
    platform, seqs = bound.selection.platform, bound.resolved.max_num_seqs
    if not isinstance(platform, HasCompile):
        raise PlatformError("the platform declares compile but has not all of HasCompile", where=platform.name)
    tokens = min(bound.resolved.max_num_batched_tokens, max(bound.max_model_len, seqs))
    return checked_shapes(
        platform.buckets(tokens, seqs),
        max_num_seqs=seqs,
        max_shapes=bound.limits.max_graph_shapes,
        mixed_steps=bound.limits.mixed_steps,
        dynamic=bound.limits.compiled.dynamic,
        where=f"{platform.name}.buckets({tokens}, {seqs})",
    )


def captured_shapes(bound: Bound) -> list[StepShape]:
    """The shapes to record, smallest first; none where nothing is recorded."""
    if bound.resolved.exec_mode is not ExecMode.CAPTURE:
        return []
    if bound.limits.capture_on_use:
        verified = MOST_SCORED if bound.resolved.speculates else 0
        return decode_shapes_on_use(max(bound.batch.spare_row, verified))
    return decode_shapes(bound.batch.spare_row, bound.limits.max_graph_shapes)


def captured_prompts(bound: Bound) -> list[PromptShape]:
    """The shapes of steps with prompt chunks to record, smallest first."""
    if bound.resolved.exec_mode is not ExecMode.CAPTURE or not bound.limits.mixed_steps:
        return []
    most = min(bound.limits.capture_prompt_tokens, bound.resolved.max_num_batched_tokens, bound.context.max_position)
    return prompt_shapes(bound.batch.spare_row, most)


def short_prompts(bound: Bound) -> ShortPrompts | None:
    """The most of prompts that a recorded step holds; None where none is recorded with prompts."""
    shapes = captured_prompts(bound)
    return ShortPrompts(shapes[-1].tokens, CHUNKS) if shapes else None


def captured(
    bound: Bound,
    eager: EagerStep,
    shapes: Sequence[StepShape],
    prompts: Sequence[PromptShape] = (),
    recorded: Callable[[], object] = lambda: None,
) -> CapturedSteps:
    """Recorded steps of these shapes; `recorded` is called after each recorded now."""
    platform, device = bound.selection.platform, bound.selection.device
    if not isinstance(platform, HasCapture):
        raise PlatformError("the platform declares capture but has no `capture` method", where=platform.name)
    on_use = bound.limits.capture_on_use
    return CapturedSteps(eager, bound.batch, bound.sampler, platform, device, shapes, recorded, on_use=on_use,
                         prompts=prompts)  # fmt: skip


def graph_memory(bound: Bound, scratch: list[KVBlocks]) -> int:
    """Bytes that recording all steps will take, from a trial with the two largest of each kind over a scratch cache.

    Recorded steps share their memory, so that each smaller one adds about what the second largest of its kind did.
    """
    shapes, prompts = captured_shapes(bound), captured_prompts(bound)
    if not shapes or bound.limits.capture_on_use:  # those run in memory that the largest steps had too
        return 0
    platform, device = bound.selection.platform, bound.selection.device
    free = [platform.memory(device).free]
    eager = EagerStep(bound.model, scratch, bound.batch)
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
    platform, device = bound.selection.platform, bound.selection.device
    assert isinstance(platform, HasCompile)
    programs = ModelProgram(bound.model, bound.context, bound.plan, kv)
    tables = bound.batch.block_tables
    root = cache_folder() / "compiled" / bound.selection.platform.name
    facts = _program_facts(bound, kv, platform.fingerprint())

    def compile_shape(inputs: StaticInputs | DynamicInputs) -> Compiled:
        folder = artifact_folder(root, {**facts, "shape": list(inputs.shape)})
        return platform.compile(ExportedStep(programs, inputs), device, folder)

    kind = DynamicInputs if bound.limits.compiled.dynamic else StaticInputs
    return CompiledSteps(
        platform,
        compile_shape,
        [
            kind(s, num_tables=len(tables), max_blocks=tables.shape[2], index_dtype=tables.dtype, device=tables.device)
            for s in shapes
        ],
        kv,
        bound.batch,
        eager if ExecMode.EAGER in bound.limits.exec_modes else None,
    )


def _program_facts(bound: Bound, kv: Sequence[KVBlocks], fingerprint: str) -> dict[str, object]:
    """Everything that the programs of an engine follow from, but for their shapes."""
    tables, device = bound.batch.block_tables, bound.selection.device
    layers = {type(module).__module__ for module in bound.model.modules()}
    cache = list(kv[0][0].shape)
    if bound.limits.compiled.dynamic:
        cache[0] = -1  # the number of blocks varies
    ops = {bound.plan.registry.op(choice.spec.op).reference.__module__ for choice in bound.plan.choices}
    return {
        "hotplug": hotplug.__version__,
        "source": source_hash(name for name in layers | ops if not name.startswith("torch.")),
        "torch": str(torch.__version__),
        "platform": bound.selection.platform.name,
        "fingerprint": fingerprint,
        "arch": device.arch,
        "plan": bound.plan.hash,
        "model": dataclasses.asdict(bound.checkpoint.config),
        "max_position": bound.context.max_position,
        "dtype": bound.resolved.dtype,
        "kv": [str(kv[0][0].dtype), str(bound.resolved.kv_layout), cache],
        "block_table": [str(tables.dtype), len(tables), tables.shape[2]],
    }
