"""`ci/kernels.py`: what makes its check fail, and one op compiled for GPUs that this machine has not."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "ci" / "kernels.py"


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    interpreted = os.environ.get("TRITON_INTERPRET")
    spec = importlib.util.spec_from_file_location("ci_kernels", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if interpreted is not None:  # the script leaves the interpreter; this process stays in it
        os.environ["TRITON_INTERPRET"] = interpreted
    return module


def launch(kernels: ModuleType, error: str = "", target: str = "sm_90", **figures: int):
    return kernels.Launch("_k", "bf16", target, {"registers": 32, "spilled": 0, "shared": 16, **figures}, error)


def test_a_kernel_that_spills_more_than_recorded_is_at_fault(kernels: ModuleType) -> None:
    spills = launch(kernels, spilled=8)
    assert kernels.faults([spills], {}) == ["_k [bf16] sm_90: spills 8, recorded 0"]
    assert kernels.faults([spills], kernels.gather([spills])) == []


def test_a_kernel_that_does_not_compile_or_fit_is_at_fault(kernels: ModuleType) -> None:
    found = kernels.faults([launch(kernels, "RuntimeError: no"), launch(kernels, target="gfx942", shared=70000)], {})
    assert found == ["_k [bf16] sm_90: does not compile: RuntimeError: no",
                     "_k [bf16] gfx942: takes 70000 bytes of shared memory, there are 65536"]  # fmt: skip


def test_every_change_is_one_line(kernels: ModuleType) -> None:
    before = kernels.gather([launch(kernels), launch(kernels, target="sm_80")])
    now = kernels.gather([launch(kernels, registers=40)])
    assert kernels.differences(before, before) == []
    assert kernels.differences(before, now) == [
        "_k [bf16] sm_80: 32 registers, 0 spilled, 16 shared -> absent",
        "_k [bf16] sm_90: 32 registers, 0 spilled, 16 shared -> 40 registers, 0 spilled, 16 shared",
    ]


def test_the_record_is_read_as_it_was_written(kernels: ModuleType) -> None:
    record = kernels.gather([launch(kernels), launch(kernels, target="gfx942")])
    assert json.loads(kernels.dump(record, "3.6.0")) == {"triton": "3.6.0", "kernels": record}
    files = sorted(kernels.RECORDS.glob("*.json"))
    assert [file.stem for file in files] == ["3.6.0", "3.7.1"]  # of torch 2.11, and of 2.12 and 2.13
    for file in files:
        document = json.loads(file.read_text())
        assert document["triton"] == file.stem
        assert file.read_text() == kernels.dump(**_renamed(document))


def _renamed(document: dict) -> dict:
    return {"record": document["kernels"], "triton": document["triton"]}


def test_an_exclusion_has_a_reason_and_a_target(kernels: ModuleType) -> None:
    from hotplug.platforms.cuda.kernels.variants import VARIANTS

    names = [target.name for target in kernels.TARGETS]
    for variant in VARIANTS:
        for target, reason in variant.excluded.items():
            assert len(reason) > 10
            assert any(name.startswith(target) for name in names)


def test_kernels_compile_as_recorded_for_gpus_that_are_not_here() -> None:
    command = [sys.executable, str(SCRIPT), "--check", "--op", "kv_write", "--target", "sm_90", "--target", "gfx942"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kernels compiled for 2 targets" in done.stdout
