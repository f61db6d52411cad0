"""Recorded steps with prompt chunks: which shape serves a step, what padding does, and the tokens of op-by-op steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_platforms import FakePlatform, candidates, limits
from hypothesis import given, settings
from hypothesis import strategies as st

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import PlatformError
from hotplug.core.platform.base import DeviceInfo, ExecMode, Feature
from hotplug.core.request import Request, SamplingParams
from hotplug.core.runner.capture_prompts import CHUNKS, PromptShape, prompt_shapes, served
from hotplug.core.runner.executable import HostStep
from hotplug.core.runner.timing import StepTimer
from hotplug.core.sample.sampler import Draw
from hotplug.core.scheduler.plan import StepPlan

FACTS = limits(
    exec_modes=(ExecMode.CAPTURE, ExecMode.EAGER), capture_prompt_tokens=256, shared_host_memory=True,
    accelerator=False, asynchronous=True, features=frozenset({Feature.SPECULATIVE}),
)  # fmt: skip


@dataclass
class Recorder(FakePlatform):
    """Records a step as the function that made it; counts replays of each shape by tokens it computes."""

    facts: Any = FACTS
    replays: int = 0
    recorded: list[Callable[[], Any]] = field(default_factory=list)

    def capture(self, step: Callable[[], Any], device: DeviceInfo) -> Callable[[], Any]:
        self.recorded.append(step)

        def replay() -> None:
            self.replays += 1
            step()

        return replay


def engine(folder: Path, platform: Any, **options: Any) -> EngineCore:
    config = {"max_num_seqs": 20, "max_model_len": 512, "kv_cache_memory": "8MiB", "load_format": "dummy", **options}
    return EngineCore(EngineConfig.from_mapping({"model": str(folder), **config}), candidates=candidates(platform))


def answers(core: EngineCore, asks: list[tuple[int, SamplingParams]]) -> dict[str, list[int]]:
    """The tokens of requests (prompt length, parameters), one more arriving with every step."""
    found: dict[str, list[int]] = {}
    waiting = [
        Request(id=str(i), prompt_token_ids=[(7 * j + 13 * i) % 250 + 2 for j in range(length)], sampling=sampling)
        for i, (length, sampling) in enumerate(asks)
    ]
    while waiting or core.has_work:
        if waiting:
            core.add(waiting.pop(0))
        for delta in core.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    return found


def sampling(i: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=float(i % 2), seed=i, max_tokens=5 + i % 4, ignore_eos=True, **more)


def eager_of(facts: Any) -> FakePlatform:
    return FakePlatform(facts=dataclasses.replace(facts, exec_modes=(ExecMode.EAGER,), capture_prompt_tokens=0))


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 64}, {"enable_prefix_cache": False},
                                     {"speculative": "ngram"}])  # fmt: skip
def test_recorded_prompts_give_the_tokens_of_op_by_op_steps(tiny_model: Path, options: dict[str, Any]) -> None:
    asks = [(length, sampling(i)) for i, length in enumerate([1, 130, 40, 256, 300, 128, 7, 90, 2, 200, 33, 64])]
    expected = answers(engine(tiny_model, eager_of(FACTS), **options), asks)
    recorder = Recorder()
    core = engine(tiny_model, recorder, **options)
    recorder.replays = 0
    assert answers(core, asks) == expected
    assert recorder.replays > 0


def test_every_step_of_short_prompts_is_replayed(tiny_model: Path) -> None:
    recorder = Recorder()
    core = engine(tiny_model, recorder)
    found = answers(core, [(100, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))] * 3)
    assert {len(tokens) for tokens in found.values()} == {4}
    assert recorder.replays == core.stats().steps


def test_what_no_shape_holds_runs_op_by_op(tiny_model: Path) -> None:
    recorder = Recorder()
    core = engine(tiny_model, recorder)
    one: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True}
    answers(core, [(300, SamplingParams(**one)), (9, SamplingParams(**one, logprobs=1)),
                   (9, SamplingParams(**one, prompt_logprobs=0))])  # fmt: skip
    assert recorder.replays == 0  # too long; scores are asked for; hidden states of a prompt are


def test_padding_writes_to_the_null_block_alone(tiny_model: Path) -> None:
    core = engine(tiny_model, Recorder(), enable_prefix_cache=False)
    caches = [cache for pair in core._executor.worker.executable._eager._kv for cache in pair]  # type: ignore[union-attr]
    for cache in caches:
        cache.zero_()
    answers(core, [(20, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))])
    size = core.bound.options.resolved.block_size
    for cache in caches:
        written = {int(block) for block in cache.flatten(1).any(1).nonzero().flatten()}
        assert len(written - {0}) == -(-20 // size)


@pytest.mark.parametrize(
    ("seqs", "tokens", "shapes"),
    [
        (20, 100, []),
        (1, 128, [(0, 128), (1, 128)]),
        (20, 300, [(0, 128), (16, 128), (20, 128), (0, 256), (16, 256), (20, 256)]),
    ],
)
def test_shapes_are_powers_of_two_beside_some_sizes_of_decodes(
    seqs: int, tokens: int, shapes: list[tuple[int, int]]
) -> None:
    assert prompt_shapes(seqs, tokens) == shapes
    assert all(shape.size == (shape.decodes + shape.tokens, shape.decodes + CHUNKS + 1)
               for shape in prompt_shapes(seqs, tokens))  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    decodes=st.integers(0, 80), chunks=st.lists(st.integers(1, 400), min_size=1, max_size=12),
    draw=st.sampled_from(Draw), scored_only=st.booleans(),
)  # fmt: skip
def test_a_step_is_served_by_the_smallest_shape_that_holds_it(
    decodes: int, chunks: list[int], draw: Draw, scored_only: bool
) -> None:
    shapes = prompt_shapes(64, 1024)
    counts = np.array([1] * decodes + chunks, np.int32)
    empty = np.empty(0, np.int32)
    plan = StepPlan(np.arange(len(counts), dtype=np.int32), counts * 0, counts, counts > 0, decodes, empty, [], empty,
                    empty, empty, empty)  # fmt: skip
    found = served(HostStep(plan, plan.rows, draw, counts.astype(np.int64), scored_only, StepTimer()), shapes)
    fits = [s for s in shapes if s.decodes >= decodes and s.tokens >= sum(chunks)]
    if draw is Draw.LOGITS or not scored_only or len(chunks) > CHUNKS:
        assert found is None
    else:
        assert (None if found is None else shapes[found]) == min(fits, key=lambda s: s.size, default=None)
    assert PromptShape(64, 1024) == shapes[-1]


def test_prompts_are_not_recorded_on_use() -> None:
    with pytest.raises(PlatformError, match="capture_prompt_tokens"):
        dataclasses.replace(FACTS, capture_on_use=True)
