"""A rank that dies, fails or hangs ends the engine in words within two seconds, and no process outlives it."""

from __future__ import annotations

import asyncio
import datetime
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import failing_worker
import parallel_models
import psutil
import pytest
from parallel_models import engine, save

from hotplug import AsyncLLM
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import EngineDeadError
from hotplug.core.parallel import group
from hotplug.core.request import Request, SamplingParams

pytestmark = pytest.mark.timeout(120)
LIMIT = 2.0
ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=200)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("llama"), "llama")
    parallel_models.tokenizer(folder)
    return folder


@pytest.fixture
def core(model: Path) -> Iterator[EngineCore]:
    core = engine(model, 2)
    yield core
    core.close()


def workers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "hotplug.core.engine.worker" in p.cmdline()]


def request() -> Request:
    return Request(id="r", prompt_token_ids=[5, 6, 7], sampling=ENDLESS, eos_token_ids=())


def until_dead(core: EngineCore) -> EngineDeadError:
    """Run steps until the engine says that it is dead."""
    with pytest.raises(EngineDeadError) as caught:
        while True:
            core.step()
    return caught.value


def gone_within(processes: list[psutil.Process], seconds: float) -> bool:
    _, alive = psutil.wait_procs(processes, seconds)
    return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def test_a_worker_that_is_killed_in_a_step_is_named(core: EngineCore) -> None:
    core.add(request())
    for _ in range(5):
        core.step()
    (worker,) = workers()
    worker.kill()
    begin = time.monotonic()
    error = until_dead(core)
    assert time.monotonic() - begin < LIMIT
    assert "rank 1 has ended, killed by SIGKILL" in str(error)
    with pytest.raises(EngineDeadError, match="rank 1 has ended"):
        core.add(request())


def test_a_worker_that_is_killed_while_nothing_runs_is_named_by_the_next_call(core: EngineCore) -> None:
    (worker,) = workers()
    worker.kill()
    time.sleep(0.2)
    with pytest.raises(EngineDeadError, match="rank 1 has ended, killed by SIGKILL"):
        core.add(request())


@pytest.mark.parametrize("how", ["load", "step", "exit"])
def test_a_worker_that_fails_says_why(how: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotplug.core.startup.rank_processes.WORKER", "failing_worker")
    monkeypatch.setenv(failing_worker.HOW, how)
    if how == "step":
        core = engine(model, 2)
        core.add(request())
        error = until_dead(core)
    else:
        with pytest.raises(EngineDeadError) as caught:
            engine(model, 2)
        error = caught.value
    if how == "exit":
        assert "rank 1 has ended, exit code 3" in str(error)
    else:
        assert "rank 1 has ended, exit code 1" in str(error)
        assert "the disk of rank 1 is gone" in str(error)
        assert 'raise RuntimeError("the disk of rank 1 is gone")' in str(error), "its own traceback"
    assert workers() == []


@pytest.mark.slow
def test_a_worker_that_hangs_ends_the_step_when_the_collectives_time_is_up(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "TIMEOUT", datetime.timedelta(seconds=4))
    core = engine(model, 2)
    core.add(request())
    core.step()
    (worker,) = workers()
    worker.suspend()
    with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
        for _ in range(3):
            core.step()
    assert gone_within([worker], 5)


def test_a_worker_ends_when_the_engine_is_let_go(model: Path) -> None:
    core = engine(model, 2)
    found = workers()
    core.add(request())
    core.step()
    del core
    assert gone_within(found, 3)


# --- with the engine in a process of its own -------------------------------------------------------


def serving(model: Path, scenario: Callable[[AsyncLLM, list[psutil.Process]], Any]) -> Any:
    """Run a scenario with an engine of two ranks, given its worker processes."""

    async def run() -> Any:
        options: dict[str, Any] = {"device": "cpu", "max_model_len": 256, "kv_cache_memory": "1MiB"}
        llm = AsyncLLM(EngineConfig(model=str(model), tensor_parallel_size=2, **options))
        await llm.start()
        try:
            await llm.wait_ready()
            return await scenario(llm, workers())
        finally:
            await llm.close()

    return asyncio.run(run())


def test_an_idle_engine_notices_that_a_worker_is_killed(model: Path) -> None:
    async def scenario(llm: AsyncLLM, found: list[psutil.Process]) -> str:
        await asyncio.sleep(0.2)
        found[0].kill()
        return await asyncio.wait_for(llm.wait_dead(), LIMIT)

    assert "rank 1 has ended, killed by SIGKILL" in serving(model, scenario)


def test_requests_in_flight_are_told(model: Path) -> None:
    async def scenario(llm: AsyncLLM, found: list[psutil.Process]) -> float:
        stream = llm.stream([5, 6, 7], ENDLESS)
        await anext(stream)
        found[0].kill()
        begin = time.monotonic()
        with pytest.raises(EngineDeadError, match="rank 1 has ended, killed by SIGKILL"):
            async for _ in stream:
                pass
        return time.monotonic() - begin

    assert serving(model, scenario) < LIMIT


def test_workers_end_with_an_engine_that_is_killed(model: Path) -> None:
    async def scenario(llm: AsyncLLM, found: list[psutil.Process]) -> None:
        stream = llm.stream([5, 6, 7], ENDLESS)
        await anext(stream)
        assert llm.engine_pid is not None
        os.kill(llm.engine_pid, signal.SIGKILL)
        assert await asyncio.to_thread(gone_within, found, LIMIT)
        await stream.aclose()

    serving(model, scenario)


@pytest.mark.slow
def test_an_idle_worker_costs_next_to_nothing(model: Path) -> None:
    async def scenario(llm: AsyncLLM, found: list[psutil.Process]) -> float:
        await llm.generate([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=4))
        await asyncio.sleep(0.5)
        begin = found[0].cpu_times()
        await asyncio.sleep(2)
        end = found[0].cpu_times()
        return (end.user + end.system - begin.user - begin.system) / 2

    assert serving(model, scenario) <= 0.02
