"""A step that fails, or is interrupted, ends its engine: what it was to write is in nobody's cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_platforms import FakePlatform, candidates, limits

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import EngineDeadError
from hotplug.core.ops.dense import silu_mul
from hotplug.core.ops.registry import Impl
from hotplug.core.request import Request, SamplingParams
from hotplug.plugins.conformance.engine_runs import small_model


@dataclass
class Fails(FakePlatform):
    """Its kernel raises `error` while there is one."""

    facts: Any = field(default_factory=lambda: limits(accelerator=False, shared_host_memory=True))
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.kernels = [Impl("silu_mul", "acme", make=lambda _: self.silu_mul)]

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return silu_mul(gate_up)


@pytest.mark.parametrize("error", [RuntimeError("no such tile"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_step_ends_the_engine(error: BaseException, asynchronous: bool, tmp_path: Path) -> None:
    facts = limits(accelerator=False, shared_host_memory=True, asynchronous=asynchronous)
    platform = Fails(facts=facts)
    config = EngineConfig(model=str(small_model(tmp_path)), kv_cache_memory="4MiB")
    core = EngineCore(config, candidates=candidates(platform))
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    core.add(Request(id="a", prompt_token_ids=[1] * 40, sampling=params))
    core.step()
    platform.error = error
    core.add(Request(id="b", prompt_token_ids=[2] * 40, sampling=params))
    with pytest.raises(type(error)):
        core.step()
    platform.error = None
    assert core.abort("a") and core.abort("b")  # whoever gives up on its requests may
    with pytest.raises(EngineDeadError, match=f"a step failed: {type(error).__name__}.*Start a new engine"):
        core.add(Request(id="c", prompt_token_ids=[2] * 41, sampling=params))
    with pytest.raises(EngineDeadError):
        core.step()
