"""The declared inputs of a step's program: their names, sizes and order, and the way to `StepInputs` and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.ops.attention import AttentionInputs
from hotplug.core.ops.inputs import StepInputs
from hotplug.core.platform.program import StepInput


def step_schema(num_tables: int, *, dynamic: bool = False) -> tuple[StepInput, ...]:
    """The inputs of a program for a model with so many block tables. `dynamic`: of varying sizes, with `kept`."""
    found = [StepInput("token_ids", ("tokens",)), StepInput("positions", ("tokens",))]
    for table in range(num_tables):
        found.append(StepInput(f"slots.{table}", ("tokens",)))
        found.append(StepInput(f"block_table.{table}", ("requests", "blocks")))
    found.append(StepInput("query_start", ("requests + 1",)))
    found.append(StepInput("seq_lens", ("requests",)))
    found.append(StepInput("logit_indices", ("scores" if dynamic else "requests",)))
    if dynamic:
        found.append(StepInput("kept", ("kept",)))
    return tuple(found)


def to_tensors(step: StepInputs) -> tuple[Tensor, ...]:
    """A step's tensors in the order of `step_schema`, without `kept`."""
    first = step.attention[0]
    tables = [x for slots, own in zip(step.slots, step.attention, strict=True) for x in (slots, own.block_table)]
    return (step.token_ids, step.positions, *tables, first.query_start, first.seq_lens, step.logit_indices)


def by_lane(caches: Sequence[Tensor], sides: int) -> list[KVBlocks]:
    """The caches of a program, `sides` of them a lane."""
    return [tuple(caches[at : at + sides]) for at in range(0, len(caches), sides)]


def from_tensors(tensors: Sequence[Tensor], max_query_len: int) -> StepInputs:
    """The step of `to_tensors`, of static shape."""
    token_ids, positions, *tables, query_start, seq_lens, logit_indices = tensors
    attention = tuple(AttentionInputs.from_node(table, query_start, seq_lens, max_query_len) for table in tables[1::2])
    return StepInputs(token_ids, positions, tuple(tables[::2]), attention, logit_indices)
