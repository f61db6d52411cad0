"""Whole models on the device, against transformers and the CPU platform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_platforms import candidates
from model_runs import ModelRun
from prompts import PROMPTS
from test_models_logits import CASES, PROMPT, reference

from hotplug import LLM, SamplingParams
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.request import Request
from hotplug.platforms.cuda import CudaPlatform
from hotplug.plugins.conformance.engine_runs import small_model

TOLERANCE = 0.08
"""Root mean square of the error over that of the logits: bfloat16 weights and activations against float32 ones."""
__all__ = ["reference"]  # the fixture: a checkpoint of each architecture and option, with its logits in float32

FAMILIES = {family: name for name, (family, _) in reversed(CASES.items())}
"""One case an architecture, and those whose attention differs."""


@pytest.mark.parametrize("reference", [*FAMILIES.values(), "mistral-window", "qwen2-mixed-window"], indirect=True)
def test_logits_in_bfloat16_are_those_of_float32(reference: tuple[Path, torch.Tensor]) -> None:
    folder, expected = reference
    run = ModelRun(folder, block_size=16, device="cuda", dtype="bfloat16", candidates=candidates(CudaPlatform()))
    for chunks in ([len(PROMPT)], [6, 9, *[1] * (len(PROMPT) - 15)]):
        error = run.logits(PROMPT, chunks).cpu() - expected
        assert error.square().mean().sqrt() / expected.square().mean().sqrt() < TOLERANCE


def test_greedy_tokens_of_smollm2_in_float32_are_the_cpu_platforms(smollm2_path: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)

    def tokens(device: str) -> list[list[int]]:
        options = {"dtype": "float32", "quantization": "none", "max_model_len": 512, "kv_cache_memory": "512MiB"}
        llm = LLM(str(smollm2_path), device=device, **options)
        return [o.outputs[0].token_ids for o in llm.generate(PROMPTS[:8], params, progress=False)]

    assert tokens("cuda") == tokens("cpu")


@pytest.mark.parametrize("mode", ["capture", "eager"])
def test_speculating_gives_the_tokens_of_one_a_step(tmp_path: Path, mode: str) -> None:
    config = EngineConfig(model=str(small_model(tmp_path)), device="cuda", dtype="float32", exec=mode, max_num_seqs=8,
                          kv_cache_memory="16MiB", speculative_ngram_min=1)  # fmt: skip
    core: Any = EngineCore(config, candidates=candidates(CudaPlatform()))

    def tokens(*, speculative: bool) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for i in range(6):
            params = SamplingParams(temperature=0.7 * (i % 2), seed=i, top_k=1 + i // 2, max_tokens=40, ignore_eos=True,
                                    speculative=speculative, logit_bias={7: 100.0} if i == 4 else None)  # fmt: skip
            core.add(Request(id=str(i), prompt_token_ids=[3 + i, 4, 5] * (2 + i), sampling=params))
        while core.has_work:
            for delta in core.step():
                found.setdefault(delta.request_id, []).extend(delta.token_ids)
        return found

    assert tokens(speculative=True) == tokens(speculative=False)
    assert core.stats().accepted_tokens > 20


def test_captured_steps_give_the_tokens_of_eager_ones(tmp_path: Path) -> None:
    def tokens(mode: str) -> dict[str, list[int]]:
        config = EngineConfig(model=str(small_model(tmp_path)), device="cuda", dtype="float32", exec=mode,
                              max_num_seqs=6, max_num_batched_tokens=64, kv_cache_memory="16MiB")  # fmt: skip
        core: Any = EngineCore(config, candidates=candidates(CudaPlatform()))
        assert bool(core.report()["shapes"]) == (mode == "capture")
        found: dict[str, list[int]] = {}
        for i in range(6):
            params = SamplingParams(temperature=0.7 * (i % 2), seed=i, max_tokens=10 + 4 * i, ignore_eos=True)
            core.add(Request(id=str(i), prompt_token_ids=[3 + i] * (1 + 17 * i), sampling=params))
        while core.has_work:
            for delta in core.step():
                found.setdefault(delta.request_id, []).extend(delta.token_ids)
        return found

    assert tokens("capture") == tokens("eager")
