"""examples/interleaved-kv: a KV kind from a package gives the tokens of the model that it is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plugin_examples import activate

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.request import Request, SamplingParams
from hotplug.plugins.conformance.engine_runs import small_model

PROMPTS = [[(7 * i + j) % 290 + 1 for j in range(10 + 17 * i)] for i in range(5)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def interleaved(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same weights under the package's architecture."""
    activate(monkeypatch, "interleaved-kv")
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "architectures": ["InterleavedLlamaForCausalLM"]}))
    return tmp_path


def start(model: Path, **options: Any) -> EngineCore:
    fixed = {"model": str(model), "device": "cpu", "kv_cache_memory": "4MiB", "max_num_seqs": 4}
    return EngineCore(EngineConfig(**{**fixed, **options}))


def run(core: EngineCore) -> list[list[int]]:
    found: dict[str, list[int]] = {str(i): [] for i in range(len(PROMPTS))}
    for name, prompt in zip(found, PROMPTS, strict=True):
        sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        core.add(Request(id=name, prompt_token_ids=prompt, sampling=sampling))
    while core.has_work:
        for delta in core.step():
            found[delta.request_id] += delta.token_ids
    return list(found.values())


@pytest.mark.parametrize("mode", ["eager", "capture"])
def test_the_tokens_are_those_of_two_tensors_a_block(llama: Path, interleaved: Path, mode: str) -> None:
    core = start(interleaved, exec=mode)
    assert core.bound.kv.groups.page[0] == 1
    assert run(core) == run(start(llama, exec=mode)) == run(core)
    assert core.stats().prefix_hits > 0


def test_its_blocks_are_swapped_like_any_other(llama: Path, interleaved: Path) -> None:
    groups = start(interleaved).bound.kv.groups
    core = start(interleaved, kv_cache_memory=12 * groups.page_bytes, swap_space="4MiB", enable_prefix_cache=False)
    assert run(core) == run(start(llama))
    stats = core.stats()
    assert stats.blocks_swapped_out > 0 and stats.blocks_swapped_in > 0
