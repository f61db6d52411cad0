"""A process of a measured tree: `python -m track.probes.worker FAMILY OPTIONS`, OPTIONS being JSON.

Its first line of output says that it is ready: {"plan_hash"}, or {"cannot": why}. It then reads a probe's name a line,
perhaps with the core that the main thread is to use from now on, runs the probe once, and answers
{"values": {figure: value}} or {"cannot": why}. Between lines it does nothing.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Protocol

MODULES = {"cpu": "cpu", "kernel": "kernels", "loop": "loop", "gpu-llama8b": "gpu", "gpu-llama1b": "gpu"}


class Probes(Protocol):
    """What a module's `start(options)` gives."""

    plan_hash: str | None
    """Of the kernel plan that the family's model runs."""

    def measure(self, probe: str) -> dict[str, float]:
        """Run a probe once: values of its figures, in their units. Raises where it cannot be run."""
        ...


def main() -> None:
    family, options = sys.argv[1], json.loads(sys.argv[2])
    # Libraries print as they like: the answers go where their prints do not.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(act: Callable[[], dict[str, Any]]) -> None:
        try:
            document = act()
        except Exception as e:
            traceback.print_exc()
            document = {"cannot": f"{type(e).__name__}: {e}"}
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    probes: list[Probes] = []

    def start() -> dict[str, Any]:
        probes.append(import_module(f"track.probes.{MODULES[family]}").start(options))
        gc.collect()
        gc.freeze()  # a full collection of what has started would fall into some samples and not into others
        return {"plan_hash": probes[0].plan_hash}

    def measure(name: str, core: str = "") -> dict[str, Any]:
        if core:
            os.sched_setaffinity(0, {int(core)})
        return {"values": probes[0].measure(name)}

    answer(start)
    for line in sys.stdin:
        answer(partial(measure, *line.split()))


if __name__ == "__main__":
    main()
