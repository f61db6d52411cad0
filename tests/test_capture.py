"""Captured steps: static shapes, padding, and the same tokens as op-by-op execution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import make_case
from fake_platforms import FakePlatform, candidates, limits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import FeatureError, PlatformError
from hotplug.core.ops import attention as attention_op
from hotplug.core.ops.inputs import StepInputs
from hotplug.core.platform.base import DeviceInfo, ExecMode
from hotplug.core.request import Request, SamplingParams
from hotplug.core.runner.capture import decode_shapes
from hotplug.core.runner.static import StaticInputs, StepShape
from hotplug.core.startup import bind as bind_module

CAPTURES = limits(
    exec_modes=(ExecMode.CAPTURE, ExecMode.EAGER), max_graph_shapes=3, shared_host_memory=True, accelerator=False
)


@dataclass
class Recorder(FakePlatform):
    """Records a step as the function that made it, and counts."""

    facts: Any = CAPTURES
    recorded: int = 0
    replayed: list[int] = field(default_factory=list)

    def capture(self, step: Callable[[], Any], device: DeviceInfo) -> Callable[[], Any]:
        number = self.recorded
        self.recorded += 1
        step()

        def replay() -> None:
            self.replayed.append(number)
            step()

        return replay


def engine(folder: Path, monkeypatch: pytest.MonkeyPatch, platform: Any, **options: Any) -> EngineCore:
    monkeypatch.setattr(bind_module, "discover", lambda: candidates(platform))
    options = {"max_num_seqs": 8, "max_model_len": 128, "kv_cache_memory": "4MiB", "load_format": "dummy", **options}
    return EngineCore(EngineConfig(model=str(folder), **options))


def tokens(core: EngineCore, requests: int = 5) -> dict[str, list[int]]:
    """Greedy and sampled requests of different lengths, so that the batch shrinks on the way."""
    found: dict[str, list[int]] = {}
    for i in range(requests):
        params = SamplingParams(temperature=float(i % 2), seed=i, max_tokens=6 + 5 * i, ignore_eos=True)
        core.add(Request(id=str(i), prompt_token_ids=list(range(5 + i, 30 - i)), sampling=params))
    while core.has_work:
        for delta in core.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    return found


def test_captured_decodes_give_the_eager_tokens(tiny_model, monkeypatch):
    recorder = Recorder()
    expected = tokens(engine(tiny_model, monkeypatch, FakePlatform(facts=limits(accelerator=False))))
    core = engine(tiny_model, monkeypatch, recorder)
    assert recorder.recorded == 9  # three sizes, each greedy, random and up to the scores
    assert tokens(core) == expected
    assert set(recorder.replayed) == {1, 4, 7, 6}  # five requests drawn in the size of 8, then 4, then 2; one greedy
    assert recorder.recorded == 9


def test_the_report_lists_the_captured_shapes(tiny_model, monkeypatch):
    assert engine(tiny_model, monkeypatch, Recorder()).report()["shapes"] == [[2, 2], [4, 4], [8, 8]]


def test_eager_may_be_asked_for_on_a_platform_that_captures(tiny_model, monkeypatch):
    recorder = Recorder()
    core = engine(tiny_model, monkeypatch, recorder, exec="eager")
    assert recorder.recorded == 0
    assert core.report()["shapes"] == []


def test_capture_on_a_platform_without_it_is_refused(tiny_model, monkeypatch):
    with pytest.raises(FeatureError, match="exec capture is not among eager"):
        engine(tiny_model, monkeypatch, FakePlatform(), exec="capture")


def test_declaring_capture_without_the_method_is_an_error(tiny_model, monkeypatch):
    with pytest.raises(PlatformError, match="has no `capture` method"):
        engine(tiny_model, monkeypatch, FakePlatform(facts=CAPTURES))


@pytest.mark.parametrize(
    ("max_num_seqs", "max_shapes", "sizes"),
    [
        (1, 0, [1]),
        (2, 0, [1, 2]),
        (8, 0, [1, 2, 4, 8]),
        (10, 0, [1, 2, 4, 8, 10]),
        (10, 2, [8, 10]),
        (128, 1, [128]),
        (50, 0, [1, 2, 4, 8, 16, 32, 48, 50]),
        (320, 0, [1, 2, 4, 8, *range(16, 257, 16), 288, 320]),
    ],
)
def test_decode_shapes_are_powers_of_two_then_steps_of_16_and_the_largest_batch(max_num_seqs, max_shapes, sizes):
    assert decode_shapes(max_num_seqs, max_shapes) == [StepShape(n, n) for n in sizes]


decode = st.integers(1, 20).map(lambda seq: (1, seq))
chunk = st.integers(1, 20).flatmap(lambda seq: st.integers(1, seq).map(lambda query: (query, seq)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    lens=st.lists(decode, min_size=1, max_size=4) | st.lists(chunk, min_size=1, max_size=4),
    spare=st.integers(0, 3),
    window=st.none() | st.integers(1, 24),
    layout=st.sampled_from(["NHD", "HND"]),
    sinks=st.none() | st.just(torch.tensor([-1.0, 0.0, 1.0, 4.0])),
    soft_cap=st.none() | st.just(0.7),
    seed=st.integers(0, 99),
)
def test_static_attention_ignores_its_padding(lens, spare, window, layout, sinks, soft_cap, seed):
    lens = sorted(lens, key=lambda pair: pair[0] > 1)
    case = make_case(lens, layout=layout, seed=seed)
    count, longest = len(case.q), max(query for query, _ in lens)
    if longest == 1:
        shape = StepShape(len(lens) + spare, len(lens) + spare)
    else:
        shape = StepShape(max(count + spare, len(lens) + 1), len(lens) + spare // 2)
        if shape.decodes:
            shape = StepShape(shape.num_tokens + 1, shape.num_requests)
    static = StaticInputs(
        shape, num_tables=1, max_blocks=case.step.block_table.shape[1] + 1, index_dtype=torch.int64,
        device=torch.device("cpu"),
    )  # fmt: skip
    zeros = torch.zeros(count, dtype=torch.int64)
    static.fill(StepInputs(zeros, zeros, (zeros,), (case.step,), zeros[: len(lens)]))
    q = torch.randn((shape.num_tokens, *case.q.shape[1:]))
    q[:count] = case.q
    rest = (0.3, window, layout, sinks, soft_cap)
    got = attention_op.attention(q, case.k_cache, case.v_cache, static.inputs.attention[0], *rest)
    expected = attention_op.attention(case.q, case.k_cache, case.v_cache, case.step, *rest)
    assert_close(got[:count], expected, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(got).all()
