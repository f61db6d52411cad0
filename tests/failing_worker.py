"""Workers that fail: modules for `hotplug.core.startup.rank_processes.WORKER`, told by an environment variable how."""

from __future__ import annotations

import os
from typing import Any

from hotplug.core.engine import worker

HOW = "HOTPLUG_TEST_FAILING_WORKER"


def main(end: int, life: int) -> None:
    from hotplug.core.runner.runner import Runner
    from hotplug.core.startup import load

    def fail(*_: Any) -> None:
        raise RuntimeError("the disk of rank 1 is gone")

    def execute(self: Any, plan: Any) -> Any:
        execute.steps -= 1  # type: ignore[attr-defined]
        if not execute.steps:  # type: ignore[attr-defined]
            fail()
        return original(self, plan)

    execute.steps = 5  # type: ignore[attr-defined]
    original = Runner.execute
    match os.environ[HOW]:
        case "load":
            load.load_weights = fail
        case "step":
            Runner.execute = execute  # type: ignore[method-assign]
        case "exit":
            os._exit(3)
    worker.main(end, life)
