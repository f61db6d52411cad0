"""Ranks that share the host's processor: each has cores of its own, and one alone has what it had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hotplug.platforms.cpu import cores
from hotplug.platforms.cpu.native import library


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[int, set[int]]:
    """Eight processors, two a core as (i, i + 4); what each rank was confined to."""
    for cpu in range(8):
        (tmp_path / str(cpu)).write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(cores, "_SIBLINGS", f"{tmp_path}/{{}}")
    monkeypatch.setattr(cores, "_alone", [4, 4])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    confined: dict[int, set[int]] = {}
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: confined.update({len(confined): set(cpus)}))
    return confined


def test_siblings_stay_together(machine: dict[int, set[int]]) -> None:
    assert cores.physical_cores() == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(
    ("ranks", "threads", "parts"),
    [
        (2, 2, [{2, 3, 6, 7}]),
        (4, 1, [{1, 5}, {2, 6}, {3, 7}]),
        (6, 1, [{1, 5}, {2, 6}, {3, 7}, {0, 4}, {1, 5}]),
    ],
)
def test_each_rank_has_its_part(
    ranks: int, threads: int, parts: list[set[int]], machine: dict[int, set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(library, "refusal", lambda: "not here")
    for rank in range(ranks):
        cores.take(rank, ranks)
    assert asked == [threads] * ranks
    assert list(machine.values()) == parts, "rank 0 is confined by its threads alone"


def test_what_a_user_limits_stays_limited_and_comes_back() -> None:
    program = """
import torch
from hotplug.platforms.cpu import cores
torch.set_num_threads(1)
cores.take(0, 2)
print(torch.get_num_threads())
torch.set_num_threads(5)
cores.take(0, 1)
print(torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["1", "1"]
