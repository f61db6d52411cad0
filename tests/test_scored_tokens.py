"""The last layer computes the rest of a step's scored tokens alone: nothing that anybody sees changes by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_platforms import FakePlatform, candidates, limits
from model_runs import ModelRun, int32
from torch import Tensor
from torch.testing import assert_close

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.request import Request, SamplingParams, TokenDelta
from hotplug.core.runner.device_batch import DeviceBatch
from hotplug.core.scheduler.plan import Admission, StepPlan
from hotplug.plugins.conformance.engine_runs import small_model

NONE = np.zeros(0, np.int32)
PROMPTS = [[(i * 31 + n * 7) % 290 + 1 for n in range(length)] for i, length in enumerate((9, 4, 21, 14))]


@pytest.fixture(scope="module", params=[None, 6], ids=["whole", "window"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models"), window=request.param)


def step(rows: list[int], start: list[int], num_tokens: list[int], samples: list[bool], num_decodes: int,
         admitted: tuple[int, ...] = ()) -> StepPlan:  # fmt: skip
    """A step of PROMPTS by row; a row admitted gets eight blocks of four tokens."""
    blocks = [(row, col, 1 + 8 * row + col) for row in admitted for col in range(8)]
    return StepPlan(
        rows=int32(*rows), start=int32(*start), num_tokens=int32(*num_tokens), samples=np.array(samples),
        num_decodes=num_decodes, released=NONE,
        admitted=[Admission(r, int32(*PROMPTS[r]), len(PROMPTS[r]), SamplingParams(), 0, ()) for r in admitted],
        block_tables=int32(*(0 for _ in blocks)),
        block_rows=int32(*(b[0] for b in blocks)), block_cols=int32(*(b[1] for b in blocks)),
        block_ids=int32(*(b[2] for b in blocks)),
    )  # fmt: skip


STEPS = [
    step([0, 1], [0, 0], [9, 4], [True, True], 0, (0, 1)),  # two whole prompts
    step([0, 1, 2, 3], [9, 4, 0, 0], [1, 1, 10, 14], [True, True, False, True], 2, (2, 3)),  # decodes and chunks
    step([2], [10], [8], [False], 0),  # a chunk, and nobody to score
    step([0, 1, 3, 2], [10, 5, 14, 18], [1, 1, 1, 3], [True] * 4, 3),
]


@torch.inference_mode()
def run(model: Path, *, scored_only: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states and scores of each step."""
    one = ModelRun(model, max_len=192, block_size=4)
    batch, decoder = one.bound.rows.batch, one.bound.model.decoder
    hidden, logits = [], []
    for i, plan in enumerate(STEPS):
        for admission in plan.admitted:
            batch.admit(admission)
        batch.last_tokens[:4] = torch.arange(4) + 7 * i + 1
        inputs = batch.inputs(plan, scored_only=scored_only)
        states, _ = decoder(inputs, one.kv)
        hidden.append(states)
        logits.append(decoder.logits(states if inputs.scored is not None else states[inputs.logit_indices]))
    return hidden, logits


def test_scores_are_those_of_a_last_layer_that_computes_all(model: Path) -> None:
    """In each step, and in later ones, which read the keys and values of tokens that were not scored."""
    (some, found), (all_, expected) = run(model, scored_only=True), run(model, scored_only=False)
    assert [len(h) for h in all_] == [13, 26, 8, 6]
    assert [len(h) for h in some] == [2, 3, 0, 4]
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_a_step_of_decodes_alone_has_nothing_to_leave_out(model: Path) -> None:
    batch = ModelRun(model, max_len=192, block_size=4).bound.rows.batch
    assert batch.inputs(step([0, 1], [9, 4], [1, 1], [True, True], 2), scored_only=True).scored is None
    assert batch.inputs(STEPS[0], scored_only=True).scored is not None
    assert batch.inputs(STEPS[0]).scored is None


# --- through the engine ---------------------------------------------------------------------------


def deltas(model: Path, asked: list[dict[str, Any]], **options: Any) -> dict[str, list[TokenDelta]]:
    fixed = {"max_num_seqs": 4, "kv_cache_memory": "4MiB", "max_num_batched_tokens": 16, "enable_prefix_cache": False}
    platform = FakePlatform(facts=limits(accelerator=False))
    core = EngineCore(EngineConfig(model=str(model), **{**fixed, **options}), candidates=candidates(platform))
    for i, params in enumerate(asked):
        params = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, **params}
        core.add(Request(id=str(i), prompt_token_ids=PROMPTS[i], sampling=SamplingParams(**params)))
    found: dict[str, list[TokenDelta]] = {}
    while core.has_work:
        for delta in core.step():
            found.setdefault(delta.request_id, []).append(delta)
    return found


def test_tokens_are_those_without_trimming(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.3}, {"logprobs": 1}]
    trimmed = deltas(model, asked)
    plain, calls = DeviceBatch.inputs, []

    def untrimmed(self: DeviceBatch, plan: StepPlan, *, scored_only: bool = False) -> Any:
        calls.append(scored_only)
        return plain(self, plan)

    monkeypatch.setattr(DeviceBatch, "inputs", untrimmed)
    whole = deltas(model, asked)
    assert any(calls)
    assert {k: [d.token_ids for d in v] for k, v in trimmed.items()} == {
        k: [d.token_ids for d in v] for k, v in whole.items()
    }


def test_prompt_logprobs_see_every_token_of_their_chunks(model: Path) -> None:
    """Beside requests that ask for none, over several chunks."""
    found = deltas(model, [{}, {}, {"prompt_logprobs": 1}, {}])
    assert [d.prompt_logprobs is not None for k in "0123" for d in found[k][:1]] == [False, False, True, False]
    (entries,) = [d.prompt_logprobs for d in found["2"] if d.prompt_logprobs is not None]
    expected = ModelRun(model, max_len=192).logits(PROMPTS[2], [len(PROMPTS[2])]).log_softmax(-1)
    assert entries[0] is None and len(entries) == len(PROMPTS[2])
    for position, entry in enumerate(entries[1:], 1):
        assert entry is not None and entry.token_ids[0] == PROMPTS[2][position]
        assert entry.logprobs[0] == pytest.approx(float(expected[position - 1, entry.token_ids[0]]), abs=1e-3)
