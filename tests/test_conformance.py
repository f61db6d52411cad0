"""The conformance kit: right platforms pass, and each planted fault fails with words that name it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from throwaway import run_python, write_distribution
from typer.testing import CliRunner
from wrong_platforms import heavy, right, wrong

from hotplug.cli.main import app
from hotplug.core.errors import ConfigError
from hotplug.platforms.cpu import CpuPlatform
from hotplug.platforms.cpu.native import library as native
from hotplug.plugins.conformance.check_ops import to
from hotplug.plugins.conformance.report import Result, certificate, run_check
from hotplug.plugins.conformance.suite import CHECKS, chosen
from hotplug.plugins.conformance.target import Options, Target

ROOT = Path(__file__).parent.parent
QUICK_BAR = 20.0
"""Seconds of a quick run."""


def examine(kind: Any, folder: Path, *names: str) -> list[Result]:
    platform = kind()
    target = Target(platform, platform.probe()[0], kind, Options(quick=True), folder)
    return [run_check(check, target) for check in chosen(names)]


FAULTS = [
    (wrong.SeesTheNextToken, "ops", "its causal mask is off by one: a query sees the token after it"),
    (wrong.IgnoresWindow, "ops", "it ignores the window"),
    (wrong.ReadsPastTheEnd, "ops", "it reads past the end of the sequence"),
    (wrong.MultipliesByZero, "ops", "it multiplies by zero what a query does not see, and NaN times 0 is NaN"),
    (wrong.StoresWhatItIsGiven, "ops", "it does not store values that are not finite as 0, with NaN in their keys"),
    (wrong.TakesNoNumberForAToken, "ops", "argmax -> right: differs from its reference"),
    (wrong.LiesInCheck, "honesty", "its check says yes and it raises RuntimeError: no tile for this head size"),
    (wrong.LeaksMemory, "leaks", "memory leaks: live tensors grow by"),
    (wrong.ScalesByGroup, "ops", "its scale is wrong for grouped-query attention, by the size of a group"),
    (wrong.InterleavesHeads, "ops", "it gives query heads the wrong key/value heads"),
    (wrong.DropsPartialBlock, "ops", "it drops the last partial block"),
    (wrong.WritesOneSlotLate, "ops", "it writes to the slot after the one it is given"),
    (wrong.PairsNeighbours, "ops", "it pairs neighbouring dimensions"),
    (wrong.BakesInTheFirstStep, "executables", "a value of the first run, such as a length, may be baked in"),
    (wrong.ReducesNothing, "collectives", "it drops the part of the other ranks"),
    (wrong.DeclaresTooMuch, "features", "exec compile is declared but does not work"),
    (wrong.ForgetsToZero, "kv", "KV memory is not zeroed"),
    (wrong.CopiesKeysOnly, "kv", "a block copied to the host is not the block it was"),
    (wrong.RefusesWithoutReason, "honesty", "its check refuses without a reason"),
    (wrong.FindsOthersWhenSpawned, "probe", "a spawned process finds other devices"),
    (heavy.ImportsTheCore, "probe", "probing imports torch"),
    (heavy.ImportsTheCore, "imports", "imports hotplug.core.ops.norm: a platform imports hotplug.vendor and nothing"),
]


@pytest.mark.parametrize(("kind", "check", "words"), FAULTS, ids=lambda v: getattr(v, "__name__", None))
def test_a_planted_fault_is_named(kind: Any, check: str, words: str, tmp_path: Path) -> None:
    (result,) = examine(kind, tmp_path, check)
    assert result.outcome == "failed"
    assert any(words in failure for failure in result.failures), result.failures


@pytest.mark.parametrize("kind", [wrong.SeesTheNextToken, wrong.DropsPartialBlock, wrong.WritesOneSlotLate])
def test_a_wrong_kernel_also_shows_in_the_tokens(kind: Any, tmp_path: Path) -> None:
    (result,) = examine(kind, tmp_path, "end_to_end")
    assert "greedy tokens differ from the references'" in result.failures[0]
    assert "hotplug bisect" in result.failures[0]


def test_a_step_that_reads_before_all_is_written_shows_where_a_prefix_is_shared(tmp_path: Path) -> None:
    (result,) = examine(wrong.SeesItsOwnWritesOnly, tmp_path, "end_to_end")
    assert result.failures
    assert all("differ from the references' sharing a prefix" in failure for failure in result.failures)


def test_every_declared_mode_is_run_end_to_end(tmp_path: Path) -> None:
    (result,) = examine(wrong.BakesInTheFirstStep, tmp_path, "end_to_end")
    assert result.data["modes"] == ["eager", "capture"]
    assert result.failures
    assert all("exec capture" in failure and "--only executables" in failure for failure in result.failures)


def outcomes(results: list[Result]) -> dict[str, Any]:
    return {r.name: r.failures or r.outcome for r in results}


def test_the_right_platform_passes_every_check(tmp_path: Path) -> None:
    expected = {check.name: "passed" for check in CHECKS} | {"collectives": "skipped"}
    assert outcomes(examine(right.Right, tmp_path)) == expected


@pytest.mark.slow
def test_the_cpu_platform_passes_every_check(tmp_path: Path) -> None:
    expected = {check.name: "passed" for check in CHECKS}
    if native.refusal() is not None:
        expected["executables"] = "skipped"  # nothing is recorded without the library
    assert outcomes(examine(CpuPlatform, tmp_path)) == expected


# --- the command and the pytest suite -------------------------------------------------------------


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy platforms as installed."""
    folder = tmp_path_factory.mktemp("toys")
    for example in ("toy-eager", "toy-capture", "toy-compile"):
        source = ROOT / "examples" / example
        project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
        modules = {str(p.relative_to(source)): p.read_text() for p in source.glob("toy_*/*.py")}
        write_distribution(folder, project["name"], version=project["version"],
                           entry_points=project["entry-points"], modules=modules)  # fmt: skip
    return folder


@pytest.mark.parametrize(
    "name",
    ["toy_eager", pytest.param("toy_capture", marks=pytest.mark.slow),
     pytest.param("toy_compile", marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_toy_platforms_conform(examples: Path, name: str) -> None:
    done = run_python(examples, "-m", "hotplug.cli", "conform", "--platform", name, "--quick", "--json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    document = json.loads(done.stdout)
    seconds = sum(check["seconds"] for check in document["checks"])
    assert seconds < QUICK_BAR
    assert document["passed"]
    assert document["platform"] == name


def test_the_pytest_suite_examines_an_installed_platform(examples: Path) -> None:
    args = ["-p", "hotplug.plugins.conformance.pytest_plugin", "--pyargs", "hotplug.plugins.conformance",
            "--hotplug-platform", "toy_eager", "--hotplug-quick", "-q"]  # fmt: skip
    done = run_python(examples, "-m", "pytest", *args, "-k", "imports or kv or end_to_end", cwd=examples)
    assert "3 passed" in done.stdout, done.stdout + done.stderr


def test_a_project_with_a_platform_option_of_its_own_runs_where_hotplug_is_installed(tmp_path: Path) -> None:
    option = "def pytest_addoption(parser):\n    parser.addoption('--platform', default='theirs')\n"
    (tmp_path / "conftest.py").write_text(option)
    (tmp_path / "test_it.py").write_text("def test_it(pytestconfig):\n    assert pytestconfig.option.platform == 'x'\n")
    done = run_python(tmp_path, "-m", "pytest", "-q", "--platform", "x", cwd=tmp_path)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_pytest_suite_without_its_plugin_says_how_to_load_it(tmp_path: Path) -> None:
    args = ("-m", "pytest", "-q", "--pyargs", "hotplug.plugins.conformance", "-k", "imports")
    done = run_python(tmp_path, *args, cwd=tmp_path)
    assert done.returncode == 4
    assert "-p hotplug.plugins.conformance.pytest_plugin" in done.stdout + done.stderr


def test_the_certificate_says_what_was_covered(tmp_path: Path) -> None:
    target = Target(right.Right(), right.Right().probe()[0], right.Right, Options(quick=True), tmp_path)
    document = certificate(target, examine(right.Right, tmp_path, "imports", "kv"))
    assert document["schema"] == 1
    assert document["ops_covered"] == {"attention": ["right"], "kv_write": ["right"], "rope": ["right"]}
    assert "linear" in document["reference_ops"]
    assert document["features"]["exec_modes"] == ["capture", "eager"]
    assert [c["name"] for c in document["checks"]] == ["imports", "kv"]
    assert json.loads(json.dumps(document)) == document


def test_the_command_prints_a_table_and_fails_with_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    from hotplug.plugins.conformance import suite

    kind = wrong.DropsPartialBlock
    monkeypatch.setattr(suite, "find_target", lambda name, options, folder: Target(
        kind(), kind().probe()[0], kind, options, folder))  # fmt: skip
    result = CliRunner().invoke(app, ["conform", "--platform", "right", "--quick", "--only", "ops", "--only", "kv"])
    assert result.exit_code == 1
    assert "failed   ops " in result.stdout
    assert "it drops the last partial block" in result.stdout
    assert "passed   kv " in result.stdout
    assert "does not conform: 1 checks failed" in result.stdout


def test_an_unknown_check_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'kv'"):
        chosen(["kvs"])


def test_an_unknown_platform_is_refused() -> None:
    result = CliRunner().invoke(app, ["conform", "--platform", "cpuu"])
    assert result.exit_code == 1
    assert "Did you mean 'cpu'" in result.stderr


def test_a_strided_tensor_keeps_its_strides() -> None:
    x = torch.arange(24.0).view(4, 6)[1:, ::2]
    moved = to(x, torch.device("cpu"))
    assert torch.equal(moved, x)
    assert moved.stride() == x.stride()
    assert moved.data_ptr() != x.data_ptr()


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", ["cpu", "toy_eager", "toy_capture", "toy_compile"])
def test_platforms_conform_with_every_case(examples: Path, name: str) -> None:
    done = run_python(examples, "-m", "hotplug.cli", "conform", "--platform", name, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("conforms")
