"""A device that runs out of memory: each place says what was asked, what is free, and which option lowers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_platforms import FakePlatform, candidates, limits

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import OutOfMemoryError
from hotplug.core.ops.dense import silu_mul
from hotplug.core.ops.registry import Impl
from hotplug.core.platform.base import DeviceInfo, MemoryInfo
from hotplug.core.request import Request, SamplingParams
from hotplug.core.runner.memory_guard import ran_out
from hotplug.plugins.conformance.engine_runs import small_model

GIB = 2**30
MESSAGE = "Acme out of memory. Tried to allocate 20.00 GiB. Acme 0 has a total capacity of 8.00 GiB of which 2 is free."


@dataclass
class Full(FakePlatform):
    """Of 8 GiB 3 are free. The kernel fails from `fails_at` tokens on, the KV cache beyond `most` blocks."""

    facts: Any = field(default_factory=lambda: limits(accelerator=False))
    fails_at: int = 1 << 30
    most: int = 1 << 30

    def __post_init__(self) -> None:
        self.kernels = [Impl("silu_mul", "acme", make=lambda _: self.silu_mul)]

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        if len(gate_up) >= self.fails_at:
            raise torch.OutOfMemoryError(MESSAGE)
        return silu_mul(gate_up)

    def memory(self, device: DeviceInfo) -> MemoryInfo:
        return MemoryInfo(free=3 * GIB, total=8 * GIB)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: DeviceInfo) -> torch.Tensor:
        if shape[2] > self.most:
            raise torch.OutOfMemoryError("Acme out of memory.")
        return torch.zeros(*shape, dtype=dtype)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models"))


@pytest.fixture
def start(model: Path) -> Callable[..., EngineCore]:
    def make(platform: Any, **options: Any) -> EngineCore:
        fixed = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "memory_utilization": 0.626}
        return EngineCore(EngineConfig(model=str(model), **{**fixed, **options}), candidates=candidates(platform))

    return make


def says(error: pytest.ExceptionInfo[OutOfMemoryError], *parts: str) -> None:
    text = str(error.value)
    assert text.startswith("acme:0: out of memory while ")
    assert "3.00 GiB of 8.00 GiB are free" in text
    for part in parts:
        assert part in text, text


def test_in_the_largest_step(start: Callable[..., EngineCore]) -> None:
    with pytest.raises(OutOfMemoryError) as error:
        start(Full(fails_at=32))
    says(error, "running the largest step", "20.00 GiB were asked for", "--max-num-batched-tokens or --max-num-seqs")


def test_while_the_kv_cache_is_allocated(start: Callable[..., EngineCore]) -> None:
    with pytest.raises(OutOfMemoryError) as error:
        start(Full(most=1), kv_cache_memory="4MiB")
    says(error, "allocating the KV cache: 4.0 MiB were asked for", "Lower --kv-cache-memory.")
    with pytest.raises(OutOfMemoryError) as error:
        start(Full(most=1))
    says(error, "allocating the KV cache", "Lower --memory-utilization;")


def test_in_a_step(start: Callable[..., EngineCore]) -> None:
    core = start(Full(fails_at=8), kv_cache_memory="4MiB")
    core.add(Request(id="a", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=2, ignore_eos=True)))
    assert core.step()
    core.add(Request(id="b", prompt_token_ids=[1] * 9, sampling=SamplingParams(max_tokens=2)))
    with pytest.raises(OutOfMemoryError) as error:
        core.step()
    says(error, "running a step", "20.00 GiB were asked for", "--kv-cache-memory", "--max-model-len")
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize(
    ("name", "doing", "option"),
    [
        ("hotplug.core.startup.built_model.build_model", "making room for the weights", "--dtype"),
        ("hotplug.core.startup.step_rows.Sampler", "making room for the sampler", "--max-num-seqs"),
        ("hotplug.core.startup.load.load_weights", "loading the weights", "--dtype"),
        ("hotplug.core.startup.start.make_executable", "preparing the steps", "--memory-utilization"),
    ],
)
def test_at_start(start: Any, monkeypatch: pytest.MonkeyPatch, name: str, doing: str, option: str) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr(name, fail)
    with pytest.raises(OutOfMemoryError) as error:
        start(Full(), kv_cache_memory="4MiB")
    says(error, doing, "20.00 GiB were asked for", option)


def test_other_errors_pass_as_they_are(start: Callable[..., EngineCore], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("hotplug.core.startup.load.load_weights", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        start(Full())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert ran_out(error) is expected
