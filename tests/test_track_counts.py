"""Counts against their record: what moves, what is left out by name, and what is counted."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from track import counts
from track.counts import Count, Counted
from track.probes import counted

from hotplug.core.ops.registry import Op, OpRegistry

NAMES = (Count("calls", "calls a step", 0.01, 0.5, "jitter", ("python",)), Count("exact", "exact", 0.0, 0.0, "same"))
HERE = {"python": "3.11", "isa": "avx2"}
RECORD = {"circumstances": HERE, "counts": {"calls": 200.0, "exact": 0}}


def compared(
    values: dict[str, float], cannot: dict[str, str] | None = None, **facts: str
) -> tuple[list[str], list[str]]:
    return counts.compare(RECORD, Counted(values, cannot or {}, {**HERE, **facts}), NAMES)


def test_what_is_within_its_tolerance_has_not_moved() -> None:
    assert compared({"calls": 201.9, "exact": 0}) == ([], [])


@pytest.mark.parametrize("value", [202.1, 197.9])
def test_what_is_beyond_it_has_whichever_way(value: float) -> None:
    (line,), _ = compared({"calls": value, "exact": 0})
    assert line.startswith(f"calls: 200 -> {value:g}, ") and "calls a step" in line and "jitter" in line


def test_an_exact_count_moves_by_one() -> None:
    (line,), _ = compared({"calls": 200, "exact": 1})
    assert line.startswith("exact: 0 -> 1 (")


def test_what_cannot_be_counted_or_belongs_to_another_machine_is_left_out_by_name() -> None:
    moved, left_out = compared({"calls": 500}, {"exact": "valgrind is not installed"}, python="3.13")
    assert moved == []
    assert left_out == ["calls: the record is of another python", "exact: valgrind is not installed"]


def test_a_count_that_is_new_or_gone_has_moved() -> None:
    moved, _ = compared({"exact": 0, "more": 1})
    assert [line.split(":")[0] for line in moved] == ["calls", "more"]


def test_a_record_keeps_what_cannot_be_counted_here() -> None:
    made = counts.document(Counted({"calls": 210}, {"exact": "not here"}, HERE), RECORD)
    assert made == {"circumstances": HERE, "counts": {"calls": 210, "exact": 0}}


def test_check_fails_with_what_moved_and_write_accepts_it(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    value, file = {"native.linear": 1000.0}, tmp_path / "counts.json"
    monkeypatch.setattr(counts, "count", lambda: Counted(dict(value), {}, counts.circumstances()))
    assert counts.main(["--check", "--record", str(file)]) == 2
    assert counts.main(["--write", "--record", str(file)]) == 0 == counts.main(["--check", "--record", str(file)])
    value["native.linear"] = 1050.0
    assert counts.main(["--check", "--record", str(file)]) == 1
    assert "moved: native.linear: 1000 -> 1050, +5.0%" in capsys.readouterr().out
    assert counts.main(["--write", "--record", str(file)]) == 0 == counts.main(["--check", "--record", str(file)])


def test_the_record_in_the_repository_has_every_count_and_the_kernels_that_are_recorded() -> None:
    recorded = json.loads(counts.RECORD.read_text())["counts"]
    assert recorded.keys() == {one.name for one in counts.COUNTS} | counts.kernel_counts().keys()
    assert counts.kernel_counts().items() <= recorded.items()
    assert recorded["loop.registry_lookups"] == 0 == recorded["cpu.recompiles"]


def test_registers_and_spills_are_summed_by_version_and_architecture(tmp_path: Path) -> None:
    one = {"sm_90": {"registers": 40, "spilled": 8}, "gfx942": {"vgprs": 26, "sgprs": 30, "spilled": 0}}
    record = {"triton": "3.7.1", "kernels": {"a": {"x": one, "y": one}, "b": {"x": one}}}
    (tmp_path / "3.7.1.json").write_text(json.dumps(record))
    assert counts.kernel_counts(tmp_path) == {
        "kernels.3.7.1.sm_90.registers": 120, "kernels.3.7.1.sm_90.spilled": 24,
        "kernels.3.7.1.gfx942.registers": 78, "kernels.3.7.1.gfx942.spilled": 0,
    }  # fmt: skip


def test_instructions_are_those_of_the_library_itself() -> None:
    profile = "\n".join([
        "ob=(1) /usr/bin/python3", "fn=(1) main", "5 100", "cob=(2) /x/libhotplug_cpu.so", "cfn=(2)", "calls=1 7",
        "5 9000", "ob=(2)", "fn=(2) ???", "0 600", "+3 50", "cob=(1)", "cfn=(1)", "calls=2 0", "* 4000", "- 7",
        "totals: 9999",
    ])  # fmt: skip
    assert counts.instructions_of("libhotplug_cpu.so", profile) == 657
    assert counts.instructions_of("python3", profile) == 100


def test_calls_of_python_of_c_and_of_the_registry_are_told_apart() -> None:
    registry = OpRegistry([Op("one", len)])

    def act() -> None:
        len("c")

    calls = counted._Calls()
    sys.setprofile(calls)
    act()
    sys.setprofile(None)
    assert (calls.python, calls.lookups) == (1, 0) and calls.c == 2  # len, and what takes the profile away
    sys.setprofile(calls)
    registry.define(Op("two", len))
    sys.setprofile(None)
    assert calls.lookups >= 1


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_instructions_of_the_native_library_are_the_same_every_time() -> None:
    if not (counts.ROOT / counts.NATIVE / counts.LIBRARY).exists():
        pytest.skip("the native library is not built")
    first = counts._instructions()
    assert first == counts._instructions() and min(first.values()) > 100_000
