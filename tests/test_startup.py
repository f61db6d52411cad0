"""An engine's start: its phases, a platform's warm-up, and the memory of recorded steps beside the KV cache."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fake_platforms import FakePlatform, candidates, limits

from hotplug.core.client import llm as llm_module
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import ConfigError
from hotplug.core.ops.dense import silu_mul
from hotplug.core.ops.registry import Impl
from hotplug.core.platform.base import DeviceInfo, ExecMode, MemoryInfo
from hotplug.core.platform.optional import HasWarmup
from hotplug.core.startup.phases import Phases
from hotplug.core.weights.read_ahead import read_ahead

MIB = 2**20
RECORDS = limits(exec_modes=(ExecMode.CAPTURE, ExecMode.EAGER), accelerator=False)


@dataclass
class Records(FakePlatform):
    """Half of 1 GiB is taken. A recorded step takes `first` bytes if no other is alive, else `more`, while it lives."""

    facts: Any = RECORDS
    total: int = 1 << 30
    first: int = 0
    more: int = 0
    live: list[int] = field(default_factory=list)

    def memory(self, device: DeviceInfo) -> MemoryInfo:
        return MemoryInfo(free=self.total // 2 - sum(self.live), total=self.total)

    def capture(self, step: Callable[[], Any], device: DeviceInfo) -> Callable[[], Any]:
        step()
        size = self.more if self.live else self.first
        self.live.append(size)
        replay = lambda: step()  # noqa: E731 (an object of its own, whose end is seen)
        weakref.finalize(replay, self.live.remove, size)
        return replay


def start(model: Path, platform: Any, **options: Any) -> EngineCore:
    fixed = {"load_format": "dummy", "max_num_seqs": 8, "max_model_len": 128, "memory_utilization": 0.75}
    return EngineCore(EngineConfig(model=str(model), **{**fixed, **options}), candidates=candidates(platform))


def test_the_memory_of_recorded_steps_is_kept_out_of_the_kv_cache(tiny_model: Path) -> None:
    without = start(tiny_model, Records())
    platform = Records(first=60 * MIB, more=2 * MIB)
    core = start(tiny_model, platform)
    block = core.bound.kv.block_bytes
    sizes = len(core.report()["shapes"])
    assert sizes == 4
    # the largest size: one of three ways to draw is the first; every smaller one adds what the second largest did
    reserved = (60 + 2 * 2 + (sizes - 1) * 3 * 2) * MIB
    assert core.report()["startup"]["steps_memory"] == {"reserved": reserved, "taken": reserved}
    assert without.num_blocks - core.num_blocks == pytest.approx(reserved / block, abs=1)
    left = platform.memory(platform.devices[0]).free - core.num_blocks * block
    assert left >= (1 - 0.75) * platform.total


def test_a_kv_cache_of_fixed_size_is_not_made_smaller(tiny_model: Path) -> None:
    cores = [start(tiny_model, Records(first=size), kv_cache_memory="4MiB") for size in (0, 60 * MIB)]
    assert cores[0].num_blocks == cores[1].num_blocks
    assert cores[1].report()["startup"]["steps_memory"] == {"reserved": 0, "taken": 60 * MIB}


def test_steps_that_are_not_recorded_reserve_nothing(tiny_model: Path) -> None:
    core = start(tiny_model, Records(first=60 * MIB), exec="eager")
    assert core.report()["startup"]["steps_memory"] == {"reserved": 0, "taken": 0}


def test_the_only_size_is_measured_itself(tiny_model: Path) -> None:
    core = start(tiny_model, Records(first=60 * MIB, more=MIB), max_num_seqs=1)
    assert core.report()["startup"]["steps_memory"] == {"reserved": 62 * MIB, "taken": 62 * MIB}


@dataclass
class Warms(FakePlatform):
    """Runs the run on the meta device steps, and keeps where its kernel was called and on what."""

    facts: Any = RECORDS
    fails: bool = False
    calls: list[tuple[str, str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kernels = [Impl("silu_mul", "acme", make=lambda _: self.silu_mul)]

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        self.calls.append((threading.current_thread().name, gate_up.device.type, len(gate_up)))
        return silu_mul(gate_up)

    def capture(self, step: Callable[[], Any], device: DeviceInfo) -> Callable[[], Any]:
        return step

    def warm_up(self, steps: Callable[[], Any], device: DeviceInfo) -> None:
        if self.fails:
            raise NotImplementedError("not here")
        steps()


def test_a_warm_up_sees_every_size_of_step_before_the_first_runs(tiny_model: Path) -> None:
    platform = Warms()
    assert isinstance(platform, HasWarmup)
    core = start(tiny_model, platform, max_num_batched_tokens=64)
    assert core.report()["startup"]["warm_up"] == "done"
    ahead = [call for call in platform.calls if call[0] == "hotplug-warm-up"]
    rest = [call for call in platform.calls if call[0] != "hotplug-warm-up"]
    assert platform.calls[: len(ahead)] == ahead
    assert {kind for _, kind, _ in ahead} == {"meta"}
    assert {kind for _, kind, _ in rest} == {"cpu"}
    assert {1, 2, 4, 8, 16, 64} <= {tokens for *_, tokens in ahead}
    assert {tokens for *_, tokens in rest} <= {tokens for *_, tokens in ahead}


def test_a_warm_up_that_fails_is_reported_and_the_engine_starts(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    core = start(tiny_model, Warms(fails=True))
    assert "compiling them ahead failed: NotImplementedError: not here" in caplog.text
    assert core.report()["startup"]["warm_up"] == "NotImplementedError: not here"
    assert start(tiny_model, Records()).report()["startup"]["warm_up"] == "none"


def test_the_phases_of_a_start_are_in_the_report_and_add_up(tiny_model: Path) -> None:
    seconds = start(tiny_model, Records()).report()["startup"]["seconds"]
    assert list(seconds) == ["bind", "weights", "kernels", "profile", "cache", "steps", "total"]
    total = seconds.pop("total")
    assert 0 < sum(seconds.values()) <= total + 0.01


def test_phases_are_timed_by_name() -> None:
    now = iter([0.0, 1.0, 3.0, 3.0, 3.5, 9.0])
    phases = Phases(clock=lambda: next(now))
    with phases("weights"):
        pass
    with phases("graphs"):
        pass
    assert phases.report() == {"weights": 2.0, "graphs": 0.5, "total": 9.0}


def test_a_tokenizer_is_loaded_while_the_engine_starts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = threading.Event()

    def load(path: Path, template: Path | None, **_: object) -> str:
        loaded.set()
        return "the tokenizer"

    started = mock.Mock(name="the engine")
    started.bound.placement.limits.accelerator = False

    def engine(config: EngineConfig) -> mock.Mock:
        assert loaded.wait(30)  # it is not begun after the engine
        return started

    monkeypatch.setattr(llm_module, "load_tokenizer", load)
    monkeypatch.setattr(llm_module, "EngineCore", engine)
    llm = llm_module.LLM(str(tiny_model))
    assert llm.tokenizer == "the tokenizer"
    assert llm.core is started


def test_a_chat_template_that_is_wrong_is_told_before_the_engine_starts(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% if %}")
    monkeypatch.setattr(llm_module, "EngineCore", lambda config: pytest.fail("the engine starts"))
    with pytest.raises(ConfigError, match=r"chat\.jinja"):
        llm_module.LLM(str(tiny_model), chat_template=str(template))


def test_files_are_read_ahead_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[int] = []
    done = threading.Event()

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        advised.append(os.fstat(descriptor).st_size)
        if len(advised) == 2:
            done.set()

    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    for size in (5, 7):
        (tmp_path / str(size)).write_bytes(bytes(size))
    read_ahead([tmp_path / "5", tmp_path / "7"])
    assert done.wait(30)
    assert advised == [5, 7]
    read_ahead([tmp_path / "absent"])  # whoever opens it says so
