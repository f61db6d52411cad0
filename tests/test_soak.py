"""Random requests through a server of a very small model, in every mode of the CPU platform; `make soak` for more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from soak_requests import BAD, cases

from hotplug.platforms.cpu import CpuPlatform

SOAK = Path(__file__).parent.parent / "ci" / "bench" / "soak.py"
MODES = CpuPlatform().limits(CpuPlatform().probe()[0]).exec_modes


@pytest.mark.parametrize("mode", MODES)
def test_sixty_random_requests_leave_nothing_behind(tiny_model: Path, mode: str) -> None:
    command = [sys.executable, str(SOAK), str(tiny_model), "--requests", "60", "--settle", "30", "--exec", mode,
               "--kv-cache-memory", "560KiB", "--load-format", "dummy"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    figures = json.loads(done.stdout)
    assert figures["exec"] == mode
    assert sum(figures["requests"].values()) == 60
    assert figures["prefix_cache_hits"] > 0


def test_requests_are_of_every_kind_and_the_same_for_a_seed() -> None:
    def make() -> list[object]:
        return list(cases("tiny", 258, 2048, 500, longest=2000, seed=0))

    made = make()
    assert made == make()
    assert len({case.status for case in made}) == len({200, *(status for _, status in BAD)})
    prompts = [json.loads(c.content).get("prompt") for c in made if c.status == 200]
    lengths = [len(prompt) for prompt in prompts if isinstance(prompt, list)]
    assert min(lengths) == 1 and max(lengths) > 1800
    assert sum(case.stream for case in made) > 150
    assert sum(case.leaves for case in made) > 50
    assert any(case.leave_at is not None for case in made) and any(case.leave_after is not None for case in made)
