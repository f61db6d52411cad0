"""The persistent batch: what reaches the device, in how many copies, and where it lies there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from model_runs import int32
from plugin_examples import null_device

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.plan import Plan
from hotplug.core.request import Request, SamplingParams
from hotplug.core.runner.device_batch import DeviceBatch
from hotplug.core.scheduler.plan import StepPlan

NONE = np.zeros(0, np.int32)


@pytest.fixture(params=[torch.int64, torch.int32], ids=["int64", "int32"])
def batch(request: pytest.FixtureRequest) -> DeviceBatch:
    return DeviceBatch(Plan(builtin_registry(), arch="test"), max_rows=5, max_len=64, block_size=4,
                 index_dtype=request.param, device=torch.device("cpu"), pin=Pins())  # fmt: skip


class Pins:
    """Makes host tensors, and counts them: each is a copy to the device."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.shapes.append(tuple(shape))
        return torch.full(tuple(shape), 77, dtype=dtype)  # as if something had been there


def plan(blocks: list[tuple[int, int, int]], rows: list[int], start: list[int], num_tokens: list[int]) -> StepPlan:
    """A step whose last `len(rows)` entries sample; entries of more than one token are chunks."""
    row, column, block = (int32(*(b[i] for b in blocks)) for i in range(3))
    return StepPlan(
        rows=int32(*rows), start=int32(*start), num_tokens=int32(*num_tokens), samples=np.ones(len(rows), bool),
        num_decodes=sum(n == 1 for n in num_tokens), released=NONE, admitted=[],
        block_tables=np.zeros_like(row), block_rows=row, block_cols=column, block_ids=block,
    )  # fmt: skip


def test_new_block_table_entries_go_with_a_step_s_inputs_in_one_copy(batch: DeviceBatch) -> None:
    batch.tokens[3, :6] = range(10, 16)
    inputs = batch.inputs(plan([(3, 0, 8), (3, 1, 9), (1, 5, 4)], [1, 3], [20, 0], [1, 6]), scored_only=True)
    assert len(batch._pin.shapes) == 1
    assert batch.block_tables[0, 3, :3].tolist() == [8, 9, 0]
    assert batch.block_tables[0, 1, 4:7].tolist() == [0, 4, 0]
    assert batch.block_tables.sum() == 21
    assert inputs.token_ids.tolist() == [0, *range(10, 16)]  # a decode's is what the device knows
    assert inputs.slots[0].tolist() == [4 * 4, *range(32, 36), 36, 37]
    assert inputs.logit_indices.tolist() == [0, 6]
    assert inputs.scored is not None
    assert inputs.scored[0].query_start.tolist() == [0, 1, 2]
    assert inputs.scored[0].seq_lens.tolist() == inputs.attention[0].seq_lens.tolist() == [21, 6]


def test_of_a_step_with_an_unfinished_chunk_only_who_samples_is_scored(batch: DeviceBatch) -> None:
    step = plan([], [0, 2, 4], [7, 0, 0], [1, 5, 3])
    step.samples[1] = False
    inputs = batch.inputs(step, scored_only=True)
    assert inputs.logit_indices.tolist() == [0, 8]
    assert inputs.scored is not None
    assert inputs.scored[0].seq_lens.tolist() == [8, 3]
    assert inputs.scored[0].block_table.shape[0] == 2
    assert inputs.attention[0].seq_lens.tolist() == [8, 5, 3]


def test_uploaded_arrays_begin_at_aligned_addresses(batch: DeviceBatch) -> None:
    arrays = [np.arange(n, dtype=np.int64) + 100 * n for n in (3, 0, 4, 1, 9)]
    sent = batch.upload(*arrays)
    assert [t.tolist() for t in sent] == [a.tolist() for a in arrays]
    assert all(t.dtype is batch.index_dtype and t.storage_offset() % 4 == 0 for t in sent)
    assert len(batch._pin.shapes) == 1


def test_a_recorded_step_s_input_is_not_filled_while_one_in_flight_is_sent(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps are under way at most; the host tensors that a size is sent from take turns."""
    core = EngineCore(EngineConfig(model=str(tiny_model), load_format="dummy", kv_cache_memory="4MiB"),
                      candidates=null_device(monkeypatch))  # fmt: skip
    sources: list[int] = []
    copy = torch.Tensor.copy_

    def noted(self: torch.Tensor, source: torch.Tensor, *args: bool, **kwargs: bool) -> torch.Tensor:
        if self.shape == source.shape == (4, 1):
            sources.append(source.data_ptr())
        return copy(self, source, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    core.add(Request(id="0", prompt_token_ids=[5, 6, 7], sampling=sampling))
    while core.has_work:
        core.step()
    assert len(sources) == 11
    assert all(len(set(sources[i : i + 3])) == 3 for i in range(9))
