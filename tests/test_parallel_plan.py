"""Step plans as bytes: whatever a plan holds arrives."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hotplug.core.errors import ConfigError
from hotplug.core.parallel.encoding import decode_plan, encode_plan
from hotplug.core.request import SamplingParams
from hotplug.core.scheduler.plan import Admission, StepPlan

INT = st.integers(-(2**31), 2**31 - 1)
COUNT = st.integers(0, 2**31 - 1)
BLOCK = st.tuples(COUNT, COUNT)


def ints(size: int | st.SearchStrategy[int]) -> st.SearchStrategy[np.ndarray]:
    return arrays.arrays(np.int32, size, elements=INT)


def samplings() -> st.SearchStrategy[SamplingParams]:
    return st.builds(
        SamplingParams,
        temperature=st.floats(0, 100, width=32),
        top_p=st.floats(0.01, 1.0),
        top_k=st.integers(0, 1000),
        seed=st.none() | st.integers(-(2**63), 2**63 - 1),
        stop=st.lists(st.text(min_size=1), max_size=2).map(tuple),
        stop_token_ids=st.lists(COUNT, max_size=3).map(tuple),
        logit_bias=st.none() | st.dictionaries(COUNT, st.floats(-100, 100), max_size=3),
        prompt_logprobs=st.none() | st.integers(0, 20),
        logits_processors=st.none() | st.dictionaries(st.text(), st.dictionaries(st.text(), COUNT | st.text())),
    )


def admissions() -> st.SearchStrategy[Admission]:
    return st.builds(
        Admission,
        row=COUNT,
        token_ids=ints(st.integers(0, 40)),
        num_prompt_tokens=COUNT,
        sampling=samplings(),
        seed=st.integers(-(2**63), 2**64 - 1),
        eos_token_ids=st.lists(COUNT, max_size=2).map(tuple),
    )


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    entries, changes = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    verifies = draw(st.integers(0, entries))
    return StepPlan(
        rows=draw(ints(entries)),
        start=draw(ints(entries)),
        num_tokens=draw(ints(entries)),
        samples=draw(arrays.arrays(np.bool_, entries)),
        num_decodes=draw(st.integers(0, entries - verifies)),
        released=draw(ints(st.integers(0, 5))),
        admitted=draw(st.lists(admissions(), max_size=3)),
        block_tables=draw(ints(changes)),
        block_rows=draw(ints(changes)),
        block_cols=draw(ints(changes)),
        block_ids=draw(ints(changes)),
        saves=draw(st.lists(st.tuples(COUNT, st.binary(min_size=16, max_size=16)), max_size=3)),
        swap_out=draw(st.lists(BLOCK, max_size=4)),
        swap_in=draw(st.lists(BLOCK, max_size=4)),
        num_verifies=verifies,
        drafts=draw(ints(st.integers(0, 9))),
    )


def plain(value: object) -> object:
    """A plan as lists, with the dtypes of its arrays."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tolist()
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [plain(each) for each in value] if isinstance(value, list) else value


@given(plans())
def test_a_plan_arrives_as_it_was_sent(plan: StepPlan) -> None:
    assert plain(decode_plan(encode_plan(plan))) == plain(plan)


def decodes(count: int) -> StepPlan:
    """A steady step: `count` decodes and nothing else."""
    none, rows = np.empty(0, np.int32), np.arange(count, dtype=np.int32)
    ones = np.ones(count, np.int32)
    return StepPlan(rows, rows * 7, ones, ones > 0, count, none, [], none, none, none, none)


def test_a_steady_step_takes_little_more_than_its_arrays() -> None:
    assert len(encode_plan(decodes(256))) <= 256 * (3 * 4 + 1) + 40


def test_arrays_of_other_widths_and_strides_arrive_by_value() -> None:
    plan = dataclasses.replace(decodes(4), rows=np.arange(8)[::2], block_ids=np.empty(0, np.int64))
    found = decode_plan(encode_plan(plan))
    assert found.rows.dtype == np.int32
    assert found.rows.tolist() == [0, 2, 4, 6]


def test_host_tensors_of_a_connector_are_not_sent() -> None:
    with pytest.raises(ConfigError, match="--kv-connector"):
        encode_plan(dataclasses.replace(decodes(1), loads=[(3, torch.zeros(1))]))


@pytest.mark.parametrize("data", [b"", b"\x93\x01\x02\x03", encode_plan(decodes(2))[:-3]])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_plan(data)
