"""What a configuration asks of a platform: settled where it is open, refused with every reason at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_platforms import FakePlatform, candidates, limits

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import FeatureError, OutOfMemoryError
from hotplug.core.platform.base import DeviceInfo, ExecMode, Feature, KVLayout, Limits
from hotplug.core.platform.features import Resolved, resolve
from hotplug.core.request import Request, SamplingParams


def settle(facts: Limits, checkpoint: str = "bfloat16", **options: Any) -> Resolved:
    return resolve(EngineConfig(**options), facts, platform="acme", checkpoint_dtype=checkpoint)


def test_open_choices_take_what_the_platform_prefers() -> None:
    facts = limits(dtypes=("float16", "bfloat16"), block_sizes=(32, 16), kv_layouts=(KVLayout.HND, KVLayout.NHD))
    assert settle(facts) == Resolved(dtype="bfloat16", kv_dtype="bfloat16", block_size=32, kv_layout=KVLayout.HND,
                                     exec_mode=ExecMode.EAGER, static_steps=False, max_num_seqs=128,
                                     max_num_batched_tokens=2048)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "settled"),
    [
        ({}, (64, 512)),
        ({"max_num_seqs": 600}, (600, 600)),
        ({"max_num_batched_tokens": 32}, (32, 32)),
        ({"max_num_seqs": 5, "max_num_batched_tokens": 7}, (5, 7)),
    ],
)
def test_the_size_of_a_step_is_the_platforms_where_the_user_leaves_it_open(options, settled):
    found = settle(limits(step_tokens=512, step_requests=64), "float32", **options)
    assert (found.max_num_seqs, found.max_num_batched_tokens) == settled


def test_auto_dtype_is_the_platforms_first_where_it_lacks_the_checkpoints() -> None:
    assert settle(limits(dtypes=("float16", "float32"))).dtype == "float16"


def test_auto_dtype_yields_to_what_the_platform_is_fast_in() -> None:
    assert settle(limits(dtypes=("float32", "bfloat16"), auto_dtype="float32")).dtype == "float32"


def test_asked_options_are_taken() -> None:
    facts = limits(dtypes=("float32", "float16"), kv_dtypes=("float32", "float16"), block_sizes=(16, 32))
    chosen = settle(facts, dtype="float16", kv_cache_dtype="float32", block_size=32)
    assert (chosen.dtype, chosen.kv_dtype, chosen.block_size) == ("float16", "float32", 32)


def test_every_reason_is_given_at_once() -> None:
    facts = limits(block_sizes=(16, 32), exec_modes=(ExecMode.CAPTURE,))
    with pytest.raises(FeatureError) as caught:
        settle(facts, dtype="float16", kv_cache_dtype="fp8_e4m3", block_size=8)
    assert caught.value.why == (
        "dtype float16 is not among float32",
        "kv_cache_dtype fp8_e4m3 is not among float32",
        "kv_cache_dtype fp8_e4m3 needs the feature fp8_kv, which is not declared",
        "block_size 8 is not among 16, 32",
        "exec eager is not among capture",
    )
    assert str(caught.value).startswith("platform acme: the platform does not serve this configuration:\n  - ")


def test_a_kv_dtype_that_needs_an_undeclared_feature_is_refused() -> None:
    facts = limits(kv_dtypes=("float32", "fp8_e4m3"))
    with pytest.raises(FeatureError, match="needs the feature fp8_kv, which is not declared"):
        settle(facts, kv_cache_dtype="fp8_e4m3")


def test_a_declared_feature_is_served() -> None:
    facts = limits(kv_dtypes=("float32", "fp8_e4m3"), features=frozenset({Feature.FP8_KV}))
    assert settle(facts, kv_cache_dtype="fp8_e4m3").kv_dtype == "fp8_e4m3"


# --- in an engine ---------------------------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch, platform: FakePlatform) -> None:
    monkeypatch.setattr("hotplug.core.startup.bind.discover", lambda: candidates(platform))


def config(model: Path, **options: Any) -> EngineConfig:
    return EngineConfig(model=str(model), load_format="dummy", max_num_seqs=4, max_num_batched_tokens=64,
                        kv_cache_memory="4MiB", **options)  # fmt: skip


def greedy(core: EngineCore, prompt: list[int], count: int) -> list[int]:
    core.add(Request(id="r", prompt_token_ids=prompt, sampling=SamplingParams(temperature=0.0, max_tokens=count)))
    tokens: list[int] = []
    while core.has_work:
        for delta in core.step():
            tokens += delta.token_ids
    return tokens


def test_features_are_refused_before_weights_are_read(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakePlatform())
    read: list[object] = []
    monkeypatch.setattr("hotplug.core.startup.load.load_weights", lambda *_: read.append(None))
    with pytest.raises(FeatureError, match="fp8_kv"):
        EngineCore(config(tiny_model, kv_cache_dtype="fp8_e4m3"))
    assert not read


def test_references_on_an_accelerator_are_one_warning_and_a_figure(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakePlatform())
    with pytest.warns(UserWarning, match=r"call sites run a plain-PyTorch reference on acme") as caught:
        core = EngineCore(config(tiny_model))
    assert len(caught) == 1
    assert core.stats().reference_ops == len(core.bound.kernels.plan.reference_sites) > 0


@pytest.mark.filterwarnings("error")
def test_references_on_the_host_are_no_warning(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakePlatform(facts=limits(accelerator=False)))
    assert EngineCore(config(tiny_model)).stats().reference_ops == 0


@pytest.mark.filterwarnings("ignore:.*plain-PyTorch reference")
@pytest.mark.parametrize(
    "facts",
    [
        limits(kv_layouts=(KVLayout.HND,)),
        limits(index_dtype="int32"),
        limits(block_sizes=(3,)),
        limits(mixed_steps=False),
    ],
    ids=["HND", "int32", "odd-block", "unmixed"],
)
def test_a_platform_of_other_facts_gives_the_same_tokens(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, facts: Limits
) -> None:
    prompt = [1, 5, 9, 2, 2, 7, 3]
    expected = greedy(EngineCore(config(tiny_model, device="cpu", dtype="float32")), prompt, 12)
    install(monkeypatch, FakePlatform(facts=facts))
    assert greedy(EngineCore(config(tiny_model)), prompt, 12) == expected
    assert len(expected) == 12


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_cpu_serves_every_pair_of_dtypes_that_it_declares(tiny_model: Path, dtype: str, kv_dtype: str) -> None:
    core = EngineCore(config(tiny_model, device="cpu", dtype=dtype, kv_cache_dtype=kv_dtype))
    assert len(greedy(core, [1, 5, 9, 2], 4)) == 4
    assert core.report()["kv"]["dtype"] == kv_dtype


@pytest.mark.filterwarnings("ignore:.*plain-PyTorch reference")
def test_memory_of_its_own_is_filled_up_to_the_share_that_was_set(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakePlatform(total=64 << 20))
    core = EngineCore(dataclasses.replace(config(tiny_model), kv_cache_memory=None, memory_utilization=0.5))
    used = core.num_blocks * core.bound.kv.block_bytes
    assert 0 <= (32 << 20) - used < core.bound.kv.block_bytes


@pytest.mark.filterwarnings("ignore:.*plain-PyTorch reference")
def test_the_profile_step_leaves_nothing_behind(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = greedy(EngineCore(config(tiny_model, device="cpu", dtype="float32")), [4, 8, 1], 12)
    install(monkeypatch, FakePlatform(total=64 << 20))
    profiled = EngineCore(dataclasses.replace(config(tiny_model), kv_cache_memory=None))
    assert greedy(profiled, [4, 8, 1], 12) == expected


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"kv_cache_memory": "1TiB"}, "Lower --kv-cache-memory"),
        ({"kv_cache_memory": "1KiB"}, "Raise --kv-cache-memory"),
    ],
)
def test_kv_memory_that_is_not_there_or_too_little_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], hint: str
) -> None:
    install(monkeypatch, FakePlatform(facts=limits(shared_host_memory=True)))
    with pytest.raises(OutOfMemoryError, match=hint):
        EngineCore(dataclasses.replace(config(tiny_model), **options))


def test_a_platform_that_allocates_its_kv_memory_is_asked_to(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[int], torch.dtype]] = []

    class Allocating(FakePlatform):
        def allocate(self, shape: list[int], dtype: torch.dtype, device: DeviceInfo) -> torch.Tensor:
            asked.append((list(shape), dtype))
            return torch.zeros(shape, dtype=dtype)

        def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
            target.copy_(source)

    install(monkeypatch, Allocating(facts=limits(shared_host_memory=True, accelerator=False)))
    core = EngineCore(config(tiny_model))
    assert asked == [([2, 2, core.num_blocks, 16, 2, 8], torch.float32)]
