"""Layers with a recurrent state beside layers with keys and values: one block a sequence, whatever befalls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import state_model

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import FeatureError
from hotplug.core.platform.discovery import Loaded
from hotplug.core.request import Request, SamplingParams
from hotplug.core.startup import installed
from hotplug.plugins.conformance.engine_runs import small_model

PROMPTS = [[(7 * i + j) % 290 + 1 for j in range(10 + 13 * i)] for i in range(5)]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    loaded = [Loaded("state", "state_model:plugin", "state 1.0", plugin=state_model.plugin())]
    monkeypatch.setattr(installed, "load_group", lambda group: loaded if group == installed.PLUGIN_GROUP else [])
    folder = small_model(tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "architectures": [state_model.ARCHITECTURE]}))
    return folder


def start(model: Path, **options: Any) -> EngineCore:
    fixed = {"model": str(model), "device": "cpu", "exec": "eager", "kv_cache_memory": "4MiB", "max_num_seqs": 4}
    return EngineCore(EngineConfig(**{**fixed, **options}))


def run(core: EngineCore, prompts: list[list[int]] = PROMPTS, max_tokens: int = 24) -> list[list[int]]:
    found: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for name, prompt in zip(found, prompts, strict=True):
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        core.add(Request(id=name, prompt_token_ids=prompt, sampling=sampling))
    while core.has_work:
        for delta in core.step():
            found[delta.request_id] += delta.token_ids
    return list(found.values())


def test_a_state_is_of_its_sequence_alone_in_any_batch_and_any_chunks(model: Path) -> None:
    alone = run(start(model, max_num_seqs=1))
    together = start(model)
    assert run(together) == alone == run(together)
    assert together.stats().prefix_hits == 0, "a state holds all tokens of its sequence: no other begins with it"
    assert run(start(model, max_num_batched_tokens=16)) == alone


@pytest.mark.parametrize("swap", [None, "4MiB"])
def test_a_preempted_sequence_comes_back_with_its_state(model: Path, swap: str | None) -> None:
    growing = [prompt[:6] for prompt in PROMPTS]
    expected, groups = run(start(model), growing, 70), start(model).bound.kv.groups
    assert groups.views, "state and attention share pages of bytes"
    core = start(model, kv_cache_memory=(groups.peak_pages(90, 2048) + 4) * groups.page_bytes, swap_space=swap)
    assert run(core, growing, 70) == expected
    stats = core.stats()
    assert stats.preemptions > 0 and (stats.blocks_swapped_in > 0) is (swap is not None)


@pytest.mark.parametrize(
    ("option", "words"),
    [({"speculative": "ngram"}, "it has no way back"), ({"exec": "compile"}, "programs have no views of pages")],
)
def test_what_a_state_cannot_go_with_is_refused(model: Path, option: dict[str, str], words: str) -> None:
    with pytest.raises(FeatureError, match=words):
        start(model, **option)
