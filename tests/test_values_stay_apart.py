"""No request's numbers reach another: what overflows in one of them is its own end, and nobody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from overflowing_model import BAD, write_overflowing_model

from hotplug import LLM, SamplingParams
from hotplug.platforms.cpu.native import library as native

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
