"""examples/extras: logits processors, a quantization scheme and a KV connector, in engines of this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_platforms import FakePlatform, candidates
from plugin_examples import activate
from throwaway import run_python

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import ConfigError, FeatureError, RequestError
from hotplug.core.request import Request, SamplingParams
from hotplug.core.startup.bind import bind
from hotplug.plugins.conformance.engine_runs import small_model

PROMPT = [(7 * i) % 290 + 1 for i in range(70)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models"))


@pytest.fixture
def start(model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineCore]:
    activate(monkeypatch, "extras")
    return lambda **options: EngineCore(
        EngineConfig(**{"model": str(model), "device": "cpu", "kv_cache_memory": "4MiB", "max_num_seqs": 4, **options})
    )


def generate(core: EngineCore, *prompts: list[int], max_tokens: int = 12, **sampling: Any) -> list[list[int]]:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **sampling})
    found: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        core.add(Request(id=str(i), prompt_token_ids=prompt, sampling=params))
    while core.has_work:
        for delta in core.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    if core._executor.worker.runner._transfer is not None:
        core._executor.worker.runner._transfer.wait()  # blocks are stored in the background
    return [found[str(i)] for i in range(len(prompts))]


# --- logits processors ----------------------------------------------------------------------------


def test_a_banned_token_never_comes(start):
    core = start()
    (plain,) = generate(core, PROMPT)
    (without,) = generate(core, PROMPT, logits_processors={"ban": {"tokens": plain}})
    assert not set(without) & set(plain)


def test_a_processor_follows_what_was_drawn(start):
    (tokens,) = generate(start(), PROMPT, max_tokens=60, logits_processors={"no-repeat": {"window": 50}})
    history = PROMPT + tokens
    for i in range(len(PROMPT), len(history)):
        assert history[i] not in history[i - 50 : i]


def test_a_processor_survives_preemption(start, model):
    core = start(kv_cache_memory=10 * 2 * 2 * 16 * 2 * 64 * 4)
    prompts = [[n, n + 1, n + 2] for n in (5, 50, 100, 150)]
    tokens = generate(core, *prompts, max_tokens=50, logits_processors={"no-repeat": {"window": 50}})
    assert core.stats().preemptions > 0
    assert all(len(set(t)) == 50 for t in tokens)


def test_requests_without_a_processor_are_left_alone(start):
    core = start()
    (alone,) = generate(core, PROMPT)
    params = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
    core.add(Request(id="banned", prompt_token_ids=PROMPT[:9], sampling=SamplingParams(
        **params, logits_processors={"ban": {"tokens": alone}})))  # fmt: skip
    assert generate(core, PROMPT) == [alone]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"bann": {"tokens": [1]}}, "no logits processor 'bann'.*'ban'"),
        ({"ban": {"tokens": [99999]}}, "logits processor ban: tokens must hold token ids"),
        ({"ban": {"token": [1]}}, "logits processor ban: .*unexpected keyword"),
        ({"no-repeat": {"window": 0}}, "window must be from 1"),
    ],
)
def test_a_processor_that_cannot_be_made_refuses_the_request(start, asked, words):
    core = start()
    with pytest.raises(RequestError, match=words) as caught:
        generate(core, PROMPT, logits_processors=asked)
    assert caught.value.param == "logits_processors"
    assert not core.has_work


# --- quantization ---------------------------------------------------------------------------------


def test_quantized_layers_are_small_and_close(start):
    plain, small = start(), start(quantization="int8")
    sites = {s["site"]: s for s in small.report()["sites"]}
    assert sites["layers.0.attn.qkv"]["op"] == "linear_int8"
    assert small.report()["quantization"] == "int8"
    x = torch.randn((5, 128), generator=torch.Generator().manual_seed(0))
    for layer in (0, 1):
        for pick in (lambda m: m.attn.qkv, lambda m: m.mlp.down):
            full, quantized = (pick(core.bound.model.decoder.layers[layer]) for core in (plain, small))
            given = x[:, : full.weight.shape[1]] if full.weight.shape[1] <= 128 else x.repeat(1, 2)[:, :192]
            error = (quantized(given) - full(given)).norm() / full(given).norm()
            assert 0 < error < 0.01
            assert quantized.stored[0].dtype is torch.int8
    assert len(generate(small, PROMPT)[0]) == 12


def test_a_scheme_that_the_platform_does_not_declare_is_refused_before_weights_load(start, model):
    config = EngineConfig(model=str(model), device="acme", quantization="int8")
    with pytest.raises(FeatureError, match="quantization int8 is not among none"):
        bind(config, candidates=candidates(FakePlatform()))


def test_an_unknown_scheme_is_refused_with_the_nearest(start):
    with pytest.raises(ConfigError, match=r"no quantization scheme 'int4'.*'int8'"):
        start(quantization="int4")


# --- KV connector ---------------------------------------------------------------------------------


def test_a_second_engine_finds_what_the_first_computed(start, tmp_path):
    first, second = (start(kv_connector=f"folder:{tmp_path}") for _ in range(2))
    expected = generate(first, PROMPT)
    assert first.stats().prefix_hits == 0
    assert generate(second, PROMPT) == expected
    assert second.stats().prefix_hits == 64  # four full blocks of 70 tokens
    longer = [*PROMPT, *expected[0], 9]
    assert generate(start(), longer) == generate(start(kv_connector=f"folder:{tmp_path}"), longer)


def test_blocks_of_generated_tokens_are_kept_too(start, tmp_path):
    core = start(kv_connector=f"folder:{tmp_path}")
    (tokens,) = generate(core, PROMPT, max_tokens=30)
    follow = start(kv_connector=f"folder:{tmp_path}")
    generate(follow, [*PROMPT, *tokens, 3])
    assert follow.stats().prefix_hits == 96  # 99 tokens have KV


def test_requests_together_get_the_tokens_that_they_get_alone(start, tmp_path):
    prompts = [[*PROMPT[: 20 + 9 * i], i + 1] for i in range(6)]
    expected = generate(start(enable_prefix_cache=False), *prompts)
    for _ in range(2):
        core = start(kv_connector=f"folder:{tmp_path}", kv_cache_memory=24 * 2 * 2 * 16 * 2 * 64 * 4)
        assert generate(core, *prompts) == expected


def test_other_weights_or_dtypes_share_no_block(start, tmp_path):
    generate(start(kv_connector=f"folder:{tmp_path}"), PROMPT)
    other = start(kv_connector=f"folder:{tmp_path}", dtype="bfloat16")
    generate(other, PROMPT)
    assert other.stats().prefix_hits == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_other_weights_of_the_same_shape_share_no_block(start, model, tmp_path):
    import safetensors.torch

    other = tmp_path / "other"
    shutil.copytree(model, other)
    tensors = safetensors.torch.load_file(other / "model.safetensors")
    safetensors.torch.save_file({k: v * 1.01 for k, v in tensors.items()}, other / "model.safetensors")
    assert (other / "model.safetensors").stat().st_size == (model / "model.safetensors").stat().st_size
    generate(start(kv_connector=f"folder:{tmp_path}/kv"), PROMPT)
    core = start(model=str(other), kv_connector=f"folder:{tmp_path}/kv")
    generate(core, PROMPT)
    assert core.stats().prefix_hits == 0


def test_salted_requests_share_no_block_with_others(start, tmp_path):
    generate(start(kv_connector=f"folder:{tmp_path}"), PROMPT)
    core = start(kv_connector=f"folder:{tmp_path}")
    core.add(Request(id="x", prompt_token_ids=PROMPT, cache_salt="tenant", sampling=SamplingParams(max_tokens=1)))
    while core.has_work:
        core.step()
    assert core.stats().prefix_hits == 0


def test_a_connector_that_fails_costs_a_prefix_and_not_the_engine(start, tmp_path):
    first = start(kv_connector=f"folder:{tmp_path}")
    expected = generate(first, PROMPT)
    (namespace,) = tmp_path.iterdir()
    for i, file in enumerate(sorted(namespace.iterdir())):
        file.write_bytes(file.read_bytes()[:100] if i % 2 else b"")
    core = start(kv_connector=f"folder:{tmp_path}")
    with pytest.warns(UserWarning, match="KV connector FolderConnector: fetch failed"):
        assert generate(core, PROMPT) == expected
    for file in namespace.iterdir():
        file.unlink()
    namespace.rmdir()
    with pytest.warns(UserWarning, match="KV connector FolderConnector: store failed"):
        generate(core, PROMPT[::-1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_connector": "folder"}, "the connector needs a folder"),
        ({"kv_connector": "foldr:/tmp"}, "no KV connector 'foldr'.*'folder'"),
        ({"kv_connector": "folder:/tmp", "enable_prefix_cache": False}, "kv_connector needs the prefix cache"),
    ],
)
def test_a_connector_that_cannot_be_made_is_refused(start, options, words):
    with pytest.raises(ConfigError, match=words):
        start(**options)


def test_a_model_that_slides_is_refused(start, tmp_path):
    with pytest.raises(FeatureError, match="one group of KV blocks"):
        start(model=str(small_model(tmp_path, window=24)), kv_connector=f"folder:{tmp_path}")


def test_gathering_parsers_loads_no_torch():
    code = "import sys; from hotplug.server.parsing import find_parsers; find_parsers('hermes', 'think'); " \
           "sys.exit('torch' in sys.modules)"  # fmt: skip
    assert run_python(Path.cwd(), "-c", code).returncode == 0
