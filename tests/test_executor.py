"""The loop and its executor: any that has the protocol's members serves, and ranks end with the one over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_platforms import FakePlatform, candidates

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import EngineDeadError
from hotplug.core.parallel.executor import Executor, InProcessExecutor
from hotplug.core.parallel.process_executor import ProcessExecutor
from hotplug.core.request import Request, SamplingParams
from hotplug.core.scheduler.plan import StepPlan
from hotplug.core.startup import start as start_module


def engine(model: Path) -> EngineCore:
    config = EngineConfig(model=str(model), load_format="dummy", max_model_len=64, kv_cache_memory="1MiB")
    return EngineCore(config, candidates=candidates(FakePlatform()))


def tokens(core: EngineCore) -> list[int]:
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    core.add(Request(id="r", prompt_token_ids=[5, 6, 7], sampling=sampling))
    found: list[int] = []
    while core.has_work:
        for delta in core.step():
            found += delta.token_ids
    return found


class Elsewhere:
    """Has the members of `Executor` and no other: hands all to one that it hides."""

    plans: list[StepPlan]

    def __init__(self, *args: Any) -> None:
        inner: Executor = InProcessExecutor(*args)
        self.plans = []

        def execute(plan: StepPlan) -> Any:
            self.plans.append(plan)
            return inner.execute(plan)

        self.execute = execute
        for name in vars(Executor):
            if not name.startswith("_") and name != "execute":
                setattr(self, name, getattr(inner, name))


@pytest.mark.filterwarnings("ignore:.*plain-PyTorch reference")
def test_the_loop_needs_no_more_of_an_executor_than_the_protocol_says(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(engine(tiny_model))
    monkeypatch.setattr(start_module, "InProcessExecutor", Elsewhere)
    core = engine(tiny_model)
    assert tokens(core) == expected
    core.wait_until_compiled()
    assert core.report()["shapes"] == []
    assert core.stats().recompiles == 0
    assert core._executor.plans[0].num_tokens.tolist() == [3]  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*plain-PyTorch reference")
def test_closing_an_engine_of_one_rank_ends_nothing(tiny_model: Path) -> None:
    core = engine(tiny_model)
    core.close()
    assert core.sentinels == ()
    assert len(tokens(core)) == 6


class Processes:
    """Stands in for `RankProcesses`."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.sentinels = (7,)
        self.close = self

    alive = True

    def __call__(self) -> None:
        self.calls.append("close")
        self.alive = False


class Worker:
    """Stands in for a `RankWorker`, and for its runner and executable."""

    timer = None

    def __init__(self, calls: list[str]) -> None:
        self.runner = self.executable = self
        self._calls = calls

    def release(self) -> None:
        self._calls.append("release")


def test_what_is_recorded_goes_before_the_ranks_that_it_talks_to_and_the_device_comes_back_last() -> None:
    processes = Processes()
    worker: Any = Worker(processes.calls)
    executor = ProcessExecutor(worker, 0, processes, lambda: processes.calls.append("closing"))  # type: ignore[arg-type]
    assert (executor.closed, executor.sentinels) == (False, (7,))
    executor.close()
    executor.close()
    assert processes.calls == ["release", "close", "closing"]
    assert (executor.closed, executor.sentinels) == (True, ())
    with pytest.raises(EngineDeadError, match="the engine was closed"):
        executor.check()
