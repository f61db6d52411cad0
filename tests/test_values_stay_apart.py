"""No request's numbers reach another: what overflows in one of them is its own end, and nobody else's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace
from overflowing_model import BAD, write_overflowing_model

from hotplug import LLM, SamplingParams
from hotplug.core.client.streams import Streams
from hotplug.core.engine.messages import Outputs
from hotplug.core.request import EngineStats, TokenDelta
from hotplug.core.scheduler.results import NO_SCORES
from hotplug.core.scheduler.tokens import StepTokens
from hotplug.platforms.cpu.native import library as native
from hotplug.server.errors import describe

PREFIX = list(range(40, 75))
INNOCENT = [[10, 20, 30], list(range(100, 150)), [*PREFIX, 77], [*PREFIX, *range(80, 90)]]
BAD_PROMPTS = [[BAD], [BAD, 9, 8], [*range(100, 140), BAD], [*PREFIX, BAD, 7], [*range(200, 250), *[BAD] * 20]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
RANDOM = SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("overflowing")
    return {dtype: write_overflowing_model(tiny_model, folder / dtype, dtype)
            for dtype in ("float16", "bfloat16", "float32")}  # fmt: skip


def start(folder: Path, **options: Any) -> LLM:
    fixed = {"device": "cpu", "max_num_seqs": 4, "kv_cache_memory": "200KiB", "max_model_len": 128, "block_size": 16}
    return LLM(str(folder), **{**fixed, **options})


def tokens(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, progress=False)]
    assert all(output.finish_reason == "length" for output in outputs)
    return [output.token_ids for output in outputs]


REFERENCES = ("attention=reference", "rope_kv_write=reference", "argmax=reference", "sample=reference")
RECORDED = pytest.mark.skipif(native.refusal() is not None, reason="nothing is recorded without the library")
WAYS = [
    ("float16", {"exec": "eager"}),
    ("bfloat16", {"exec": "eager"}),
    ("float32", {"exec": "eager"}),
    ("float32", {"exec": "eager", "force": ("attention=cpu.sdpa",)}),
    ("float32", {"exec": "eager", "force": REFERENCES}),
    pytest.param("float32", {"exec": "capture"}, marks=RECORDED),
    ("float32", {"exec": "compile", "block_size": 32}),
]


@pytest.mark.parametrize(("dtype", "options"), WAYS)
def test_answers_are_the_same_before_beside_and_after_a_request_that_overflows(
    folders: dict[str, Path], dtype: str, options: dict[str, Any]
) -> None:
    llm = start(folders[dtype], dtype=dtype, **options)
    for params in (GREEDY, RANDOM):
        before = tokens(llm, INNOCENT, params)
        for _ in range(3):
            mixed = [prompt for pair in zip(BAD_PROMPTS, INNOCENT, strict=False) for prompt in pair]
            outputs = [output.outputs[0] for output in llm.generate(mixed, params, progress=False)]
            assert [output.token_ids for output in outputs[1::2]] == before
            assert [output.finish_reason for output in outputs[::2]] == ["error"] * len(outputs[::2])
            llm.generate(BAD_PROMPTS, params, progress=False)
            assert tokens(llm, INNOCENT, params) == before


@pytest.fixture(scope="module")
def llm(folders: dict[str, Path]) -> LLM:
    return start(folders["float16"], dtype="float16", exec="eager", max_num_seqs=8, kv_cache_memory="2MiB")


HARD: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.0, "seed": 1},
    "filtered": {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.05, "seed": 1},
    "speculating": {"temperature": 0.0, "speculative": True},
    "with log-probabilities": {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2},
    "with penalties": {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    "with biases": {"temperature": 0.0, "logit_bias": {7: 1.0}, "min_tokens": 3},
}


@pytest.mark.parametrize("options", HARD.values(), ids=HARD)
def test_a_request_without_scores_ends_with_an_error_of_its_own(llm: LLM, options: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=8, **options)
    bad, good = (o.outputs[0] for o in llm.generate([[9, 8, BAD, 9, 8], [9, 8, 7]], params, progress=False))
    assert (bad.finish_reason, bad.token_ids, bad.text) == ("error", [], "")
    assert "scores for the next token are not finite numbers" in bad.error
    assert good.finish_reason in ("length", "stop")
    assert (good.error, len(good.token_ids) > 0) == ("", True)


def test_a_token_that_overflows_ends_the_answer_after_it(llm: LLM) -> None:
    """Forced by a bias, as the model's own choice might be."""
    forced = SamplingParams(temperature=0.0, max_tokens=8, logit_bias={BAD: 100.0}, ignore_eos=True)
    for speculative in (False, True):
        (output,) = llm.generate([[9, 8, 7]], replace(forced, speculative=speculative), progress=False)
        assert output.outputs[0].token_ids == [BAD]
        assert output.outputs[0].finish_reason == "error"


def test_what_failed_is_not_found_in_the_prefix_cache_and_its_blocks_are_free(llm: LLM) -> None:
    prompt = [*range(150, 200), BAD]
    for _ in range(2):
        (output,) = llm.generate([prompt], GREEDY, progress=False)
        assert output.outputs[0].finish_reason == "error"
        assert output.num_cached_tokens == 0
    assert llm.core.stats().kv_blocks_used == 0
    (first,), (again,) = (llm.generate([prompt[:-1]], GREEDY, progress=False) for _ in range(2))
    assert again.num_cached_tokens == 48  # what is right is found
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_preempted_requests_fail_alone(folders: dict[str, Path]) -> None:
    """A pool for two sequences: others are swapped or recomputed, as those that overflow are."""
    options = {"kv_cache_memory": "60KiB", "exec": "eager", "dtype": "float16"}
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompts = [[60 + i, 70, 80] for i in range(4)]
    alone = [tokens(start(folders["float16"], **options), [prompt], params)[0] for prompt in prompts]
    for more in ({}, {"swap_space": "60KiB"}):
        llm = start(folders["float16"], **options, **more)
        for _ in range(2):
            outputs = llm.generate([prompts[0], [BAD, 1], prompts[1], prompts[2], [2, BAD], prompts[3]], params,
                                   progress=False)  # fmt: skip
            found = [o.outputs[0] for o in outputs]
            assert [found[i].finish_reason for i in (1, 4)] == ["error"] * 2
            assert [found[i].token_ids for i in (0, 2, 3, 5)] == alone


def test_a_served_request_is_told_why() -> None:
    """The front end's part: its stream ends with the reason, as HTTP status 500 and as the error of an event."""
    failed: list[Exception] = []
    stream = SimpleNamespace(request_id="a", mailbox=SimpleNamespace(fail=failed.append))
    streams = Streams.__new__(Streams)
    streams._streams = {7: stream}
    gained = StepTokens(deltas=[TokenDelta("a", [], "error", error=NO_SCORES, tag=7)])
    assert streams.take(Outputs.of(gained, EngineStats()), 0.0, None) == ["a"]
    status, body, _ = describe(failed[0])
    assert (status, body["error"]["message"]) == (500, NO_SCORES)
