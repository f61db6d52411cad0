"""Executors: what runs an engine's steps on all of its ranks, behind one interface that the loop sees.

The loop knows neither how many ranks there are nor where they run. Each rank is a `RankWorker`; an executor holds that
of rank 0 and sees to it that the others get every plan.
"""

from __future__ import annotations

from typing import Any, Protocol

from hotplug.core.errors import EngineDeadError
from hotplug.core.runner.rank_worker import RankWorker
from hotplug.core.runner.timing import StepTimer
from hotplug.core.scheduler.plan import StepPlan, StepResult


class PendingStep(Protocol):
    """A step in flight."""

    def result(self) -> StepResult:
        """Its tokens; waits for them."""
        ...


class Executor(Protocol):
    """Runs steps in the order in which they are given, several in flight; results are asked for in that order."""

    @property
    def ahead(self) -> int:
        """Steps that may be in flight while the next is planned: 0 where the device works with the host, not beside."""
        ...

    @property
    def timer(self) -> StepTimer:
        """The phases of the steps. The loop marks its own in it."""
        ...

    @property
    def recompiles(self) -> int:
        """Compilations that steps set off, beyond the prepared shapes."""
        ...

    @property
    def closed(self) -> bool:
        """Whether other ranks were ended, so that no step can run."""
        ...

    @property
    def sentinels(self) -> tuple[int, ...]:
        """File descriptors that become readable when another rank's process has ended."""
        ...

    def execute(self, plan: StepPlan) -> PendingStep:
        """Launch a step on every rank. Raises OutOfMemoryError, EngineDeadError, or whatever a kernel raises."""
        ...

    def save(self, blocks: list[tuple[int, bytes]]) -> None:
        """Hand full blocks to the KV connector, outside of a step."""
        ...

    def wait_until_ready(self) -> None:
        """Return when every prepared shape is there. Raises PlatformError where compiling one failed."""
        ...

    def report(self) -> dict[str, Any]:
        """The prepared shapes, and what became of them, as plain data."""
        ...

    def check(self) -> None:
        """Raises EngineDeadError where another rank has ended, or `close` was called."""
        ...

    def blame(self, error: BaseException) -> EngineDeadError | None:
        """What is behind the failure of a step, if it is the end of another rank."""
        ...

    def close(self) -> None:
        """End the other ranks, if there are any: no step can run then. May be called again."""
        ...


class InProcessExecutor:
    """Runs the steps of an engine with one rank, in this process."""

    closed = False
    sentinels: tuple[int, ...] = ()

    def __init__(self, worker: RankWorker, ahead: int) -> None:
        self.worker = worker
        self.ahead = ahead
        self.timer = worker.runner.timer
        self.execute = worker.runner.execute  # as it is: hot path
        self.save = worker.runner.save

    @property
    def recompiles(self) -> int:
        return self.worker.executable.recompiles

    def wait_until_ready(self) -> None:
        self.worker.executable.wait()

    def report(self) -> dict[str, Any]:
        return self.worker.executable.report()

    def check(self) -> None:
        """Nothing: there is no other rank."""

    def blame(self, error: BaseException) -> None:
        """Nobody."""

    def close(self) -> None:
        """Nothing: there is no other rank, and the engine can go on."""
