"""Gemma 3 end to end: layers with a window beside full ones, in every mode and under every pressure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plugin_examples import activate
from typer.testing import CliRunner

from hotplug.cli.main import app
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import FeatureError, UnsupportedModelError
from hotplug.core.kv.spec import FullAttention, SlidingWindow
from hotplug.core.models.gemma3 import read_config
from hotplug.core.request import Request, SamplingParams

WINDOW, LAYERS, TOKENS = 24, 6, 40
PROMPTS = [[(7 * i + j * j) % 250 + 2 for j in range(length)] for i, length in enumerate((5, 33, 48, 20, 61, 90))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
SIZES = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": WINDOW,
    "query_pre_attn_scalar": 16, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, saved by transformers: five layers of six slide."""
    import transformers

    torch.manual_seed(3)
    saved = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES)).eval().float()
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.normal_(0.0, 0.1) if parameter.dim() > 1 else parameter.uniform_(-0.2, 0.2)
    folder = tmp_path_factory.mktemp("gemma3")
    saved.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """What transformers generates."""
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    found = []
    for prompt in PROMPTS:
        ids = loaded.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        found.append(ids[0, len(prompt) :].tolist())
    return found


def engine(model: Path, **options: Any) -> EngineCore:
    fixed = {"device": "cpu", "dtype": "float32", "block_size": 16, "max_num_seqs": 4, "kv_cache_memory": "8MiB"}
    return EngineCore(EngineConfig(**{**fixed, "model": str(model), **options}))


def run(core: EngineCore, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    found: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for name, prompt in zip(found, prompts, strict=True):
        core.add(Request(id=name, prompt_token_ids=prompt, sampling=GREEDY))
    while core.has_work:
        for delta in core.step():
            found[delta.request_id] += delta.token_ids
    return list(found.values())


def pages(core: EngineCore, count: int) -> dict[str, int]:
    """KV memory of so many pages."""
    return {"kv_cache_memory": count * core.bound.kv.groups.page_bytes}


@pytest.fixture
def started(model: Path) -> Iterator[EngineCore]:
    core = engine(model)
    yield core
    core.close()


@pytest.mark.parametrize("mode", ["eager", "capture", "compile"])
def test_tokens_equal_those_of_transformers(model: Path, expected: list[list[int]], mode: str) -> None:
    core = engine(model, exec=mode, block_size=None)
    core.wait_until_compiled()
    assert run(core) == expected


@pytest.mark.parametrize("mode", ["eager", "capture"])
def test_a_second_run_meets_its_prefixes(model: Path, expected: list[list[int]], mode: str) -> None:
    core = engine(model, exec=mode)
    assert run(core) == expected == run(core)
    assert core.stats().prefix_hits >= 16


@pytest.mark.parametrize("swap", [None, "8MiB"])
@pytest.mark.parametrize("mode", ["eager", "capture"])
def test_a_cache_that_is_too_small_preempts_and_changes_nothing(
    model: Path, started: EngineCore, expected: list[list[int]], mode: str, swap: str | None
) -> None:
    least = started.bound.kv.groups.peak_pages(130 + TOKENS, 2048)
    core = engine(model, exec=mode, swap_space=swap, enable_prefix_cache=False, **pages(started, least + 4))
    assert run(core) == expected
    stats = core.stats()
    assert stats.preemptions > 0 and (stats.blocks_swapped_in > 0) is (swap is not None)


def test_prompts_in_chunks_and_speculation_change_nothing(model: Path, expected: list[list[int]]) -> None:
    core = engine(model, max_num_batched_tokens=16, speculative="ngram", speculative_ngram_min=1)
    assert run(core) == expected
    assert core.stats().proposed_tokens > 0


def test_layers_with_a_window_hold_their_window(model: Path) -> None:
    """At 400 tokens the five sliding layers hold what a window and a step need, the sixth all of it."""
    core = engine(model, max_num_batched_tokens=32)
    groups = core.bound.kv.groups
    assert [(type(group.spec), len(group.layers)) for group in groups.groups] == [
        (SlidingWindow, 5),
        (FullAttention, 1),
    ]
    core.add(Request(id="long", prompt_token_ids=[5] * 400, sampling=SamplingParams(temperature=0.0, max_tokens=8)))
    while core.has_work and core.stats().generated_tokens < 4:
        core.step()
    used = core.stats().kv_blocks_used
    full, window = 400 // 16 + 1, (WINDOW + 32) // 16 + 1
    assert full + 5 * (WINDOW // 16) <= used <= full + 5 * window
    assert used * 6 < 6 * 6 * full / 2, "less than half of what six full layers hold"


def test_explain_names_the_groups(started: EngineCore) -> None:
    kv = started.report()["kv"]
    assert [(group["kind"], group["layers"], group["pages"]) for group in kv["groups"]] == [
        ("window", 5, 5),
        ("full", 1, 1),
    ]
    assert f"window={WINDOW}" in kv["groups"][0]["spec"] and kv["lanes"] == 1


def test_explain_shows_what_each_group_keeps(model: Path) -> None:
    shown = CliRunner().invoke(app, ["explain", str(model), "--device", "cpu"]).stdout
    shown = " ".join(shown.split())
    assert "5 x SlidingWindow(num_kv_heads=2, head_dim=16, window=24), 5 pages a block" in shown
    assert "1 x FullAttention(num_kv_heads=2, head_dim=16), 1 pages a block; 1 layers a page" in shown


def test_a_connector_is_refused_with_the_groups(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    activate(monkeypatch, "extras")
    with pytest.raises(FeatureError, match="one group of KV blocks"):
        engine(model, kv_connector="folder:/tmp/x")


def test_both_spellings_of_the_rotary_parameters_are_read(model: Path) -> None:
    values = json.loads((model / "config.json").read_text())
    new = read_config(values, "config.json", (1,))
    old = {key: value for key, value in values.items() if key not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    assert read_config(old, "config.json", (1,)) == new
    scaled = read_config({**old, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "config.json", (1,))
    assert (scaled.rope.factor, scaled.sliding_rope) == (8.0, new.sliding_rope)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is not built"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not built"),
        ({"use_bidirectional_attention": True}, "attention to later tokens"),
        ({"layer_types": ["full_attention"] * 5 + ["chunked_attention"]}, "layers of type 'chunked_attention'"),
        ({"hidden_activation": "relu"}, "the activation 'relu' is not built"),
    ],
)
def test_what_is_not_built_is_refused_by_name(model: Path, wrong: dict[str, Any], words: str) -> None:
    values = json.loads((model / "config.json").read_text())
    with pytest.raises(UnsupportedModelError, match=words):
        read_config({**values, **wrong}, "config.json", (1,))
