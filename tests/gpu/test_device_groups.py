"""KV groups on a device: a model with layers that slide and layers that do not, in every mode, swapped too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.request import Request, SamplingParams

PROMPTS = [[(7 * i + j * j) % 250 + 2 for j in range(length)] for i, length in enumerate((5, 133, 248, 20, 361, 90))]
SIZES = {
    "vocab_size": 258, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "head_dim": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "sliding_window": 96,
    "query_pre_attn_scalar": 64, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 with random weights: five layers of six slide."""
    import transformers

    torch.manual_seed(3)
    saved = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES)).eval().float()
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.normal_(0.0, 0.05) if parameter.dim() > 1 else parameter.uniform_(-0.2, 0.2)
    folder = tmp_path_factory.mktemp("gemma3")
    saved.save_pretrained(folder)
    return folder


def start(model: Path, **options: Any) -> EngineCore:
    fixed = {"device": "cuda", "dtype": "float32", "max_num_seqs": 4, "kv_cache_memory": "256MiB"}
    return EngineCore(EngineConfig(**{**fixed, "model": str(model), **options}))


def run(core: EngineCore) -> list[list[int]]:
    found: dict[str, list[int]] = {str(i): [] for i in range(len(PROMPTS))}
    for name, prompt in zip(found, PROMPTS, strict=True):
        sampling = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
        core.add(Request(id=name, prompt_token_ids=prompt, sampling=sampling))
    while core.has_work:
        for delta in core.step():
            found[delta.request_id] += delta.token_ids
    return list(found.values())


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """What the host processor gives."""
    return run(start(model, device="cpu"))


@pytest.mark.parametrize("mode", ["eager", "capture", "compile"])
def test_tokens_are_the_host_processors(model: Path, expected: list[list[int]], mode: str) -> None:
    core = start(model, exec=mode)
    core.wait_until_compiled()
    assert run(core) == expected == run(core)
    assert core.stats().prefix_hits > 0


@pytest.mark.parametrize("mode", ["eager", "capture"])
def test_a_cache_that_is_too_small_swaps_every_group(model: Path, expected: list[list[int]], mode: str) -> None:
    groups = start(model).bound.kv.groups
    small = (groups.peak_pages(400, 2048) + 8) * groups.page_bytes
    core = start(model, exec=mode, kv_cache_memory=small, swap_space="256MiB", enable_prefix_cache=False)
    assert run(core) == expected
    stats = core.stats()
    assert stats.preemptions > 0 and stats.blocks_swapped_in > 0
