"""An engine in a process of its own, in the environment where it is installed: `python worker.py ENGINE OPTIONS`.

OPTIONS is JSON. Reads a request a line, {"prompts", "new_tokens", "share"}, and answers with the times at which each
request's tokens came, {"times"}, in seconds from when it was asked; {} asks for {"rss"}, the peak in bytes.
The first line that it writes says that it is ready, and what it is: {"about", "plan_hash"}.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """What a module `engine_NAME` makes: `start(options) -> Engine`."""

    about: str
    """Version and weights."""

    def generate(self, prompts: list[list[int]], new_tokens: int, *, share: bool) -> list[list[float]]:
        """Greedy, end of sequence ignored: seconds from now at which each request's tokens came.

        `share`: the requests have a prefix in common that the engine may compute once, without being told which.
        """
        ...


def peak_rss() -> int:
    """Bytes of this process and of those that it has started, each at its own highest. Linux."""
    parents, peaks = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue  # it has just ended
        pid = int(fields["Pid"])
        parents[pid], peaks[pid] = int(fields["PPid"]), int(fields.get("VmHWM", "0").split()[0]) * 1024
    family = {os.getpid()}
    while new := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= new
    return sum(peaks[pid] for pid in family)


def main() -> None:
    name, options = sys.argv[1], json.loads(sys.argv[2])
    # Engines print as they like: the answers go where their prints do not.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(document: dict[str, Any]) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    engine: Engine = importlib.import_module(f"engine_{name}").start(options)
    answer({"about": engine.about, "plan_hash": getattr(engine, "plan_hash", None)})
    for line in sys.stdin:
        asked = json.loads(line)
        if not asked:
            answer({"rss": peak_rss()})
            continue
        answer({"times": engine.generate(asked["prompts"], asked["new_tokens"], share=asked["share"])})


if __name__ == "__main__":
    main()
