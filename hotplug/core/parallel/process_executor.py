"""The executor of several ranks on one host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hotplug.core.errors import EngineDeadError
from hotplug.core.parallel.encoding import encode_plan
from hotplug.core.parallel.executor import PendingStep
from hotplug.core.parallel.processes import RankProcesses
from hotplug.core.runner.rank_worker import RankWorker
from hotplug.core.scheduler.plan import StepPlan


class ProcessExecutor:
    """Rank 0 runs in this process, the others in processes of their own that get every plan as well."""

    def __init__(self, worker: RankWorker, ahead: int, processes: RankProcesses, closing: Callable[[], None]) -> None:
        """`worker` is rank 0's; `processes` wait for steps. `closing` is called once, when they have ended."""
        self.worker = worker
        self.ahead = ahead
        self.timer = worker.runner.timer
        self._processes = processes
        self._closing = closing

    @property
    def recompiles(self) -> int:
        return self.worker.executable.recompiles

    @property
    def closed(self) -> bool:
        return not self._processes.close.alive

    @property
    def sentinels(self) -> tuple[int, ...]:
        return () if self.closed else self._processes.sentinels

    def execute(self, plan: StepPlan) -> PendingStep:
        self._processes.send(encode_plan(plan))
        return self.worker.runner.execute(plan)

    def save(self, blocks: list[tuple[int, bytes]]) -> None:
        self.worker.runner.save(blocks)

    def wait_until_ready(self) -> None:
        self.worker.executable.wait()

    def report(self) -> dict[str, Any]:
        return self.worker.executable.report()

    def check(self) -> None:
        if self.closed:
            raise EngineDeadError("the engine was closed")
        self._processes.check()

    def blame(self, error: BaseException) -> EngineDeadError | None:
        return self._processes.blame(error)

    def close(self) -> None:
        if self.closed:
            return
        self.worker.executable.release()  # what is recorded may hold on to the group's connections
        self._processes.close()
        self._closing()
