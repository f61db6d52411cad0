"""Kernel configurations as data: what is read, what a lookup finds, what a measurement may change, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_platforms import FakePlatform, candidates
from typer.testing import CliRunner

from hotplug.cli.main import app
from hotplug.cli.tune import line
from hotplug.core.ops.registry import Impl, SiteSpec
from hotplug.core.platform import discovery
from hotplug.core.platform.optional import HasTuning
from hotplug.core.startup import bind as bind_module
from hotplug.platforms.cuda import CudaPlatform, tuning
from hotplug.platforms.cuda.tuner import tune
from hotplug.platforms.cuda.tuning import Case, Config, Key, Tunable, Tuned
from hotplug.vendor import DeviceInfo, PlatformError, TuningResult, TuningSummary

DEVICE = "Acme 1"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOTPLUG_CACHE", str(tmp_path / "cache"))
    return tmp_path


def site(width: int = 8, name: str = "a", op: str = "double") -> SiteSpec:
    return SiteSpec(op, name, "float32", "v1", {"width": width})


def double(speed: dict[int, float], made: list[Key] | None = None, **changes: Any) -> tuple[Tunable, Any]:
    """A kernel whose BLOCK decides its speed: microseconds by BLOCK. 3 computes wrong values, 5 does not compile."""
    running: list[int] = []

    def run(x: torch.Tensor, config: Config) -> torch.Tensor:
        running.append(config["BLOCK"])
        if config["BLOCK"] == 5:
            raise RuntimeError("out of resources: shared memory\nmore")
        return 2 * x if config["BLOCK"] != 3 else 2.1 * x

    def make(key: Key, device: torch.device) -> Case:
        if made is not None:
            made.append(key)
        x = torch.arange(1.0, key["width"] + 1)
        return Case(lambda config: run(x, config), lambda: x + x, num_bytes=8 * key["width"])

    def timer(calls: Sequence[Callable[[], Any]]) -> float:
        calls[0]()
        return speed[running[-1]]

    tunable = Tunable(
        op="double", shape=lambda spec: {"width": spec["width"]},
        candidates=lambda key: [{"BLOCK": block} for block in speed], make=make,
        **{"kernel": "double", "tokens": (1, 16), "default": lambda key: {"BLOCK": 1}, **changes},
    )  # fmt: skip
    return tunable, timer


def run(tunable: Tunable, timer: Any, output: Path, **changes: Any) -> tuple[TuningSummary, list[TuningResult]]:
    results: list[TuningResult] = []
    given = {"sites": [site()], "seconds": 60.0, "cache_bytes": 100, "device_name": DEVICE, **changes}
    summary = tune([tunable], device=torch.device("cpu"), report=results.append, output=output, timer=timer, **given)
    return summary, results


# --- measuring ------------------------------------------------------------------------------------


def test_the_fastest_configuration_is_kept_and_found_again(cache):
    tunable, timer = double({1: 10.0, 2: 5.0, 4: 8.0})
    summary, results = run(tunable, timer, tuning.own_folder() / tuning.file_name(DEVICE))
    assert [(r.shape, r.before, r.after, r.before_us, r.after_us) for r in results] == [
        ({"width": 8, "tokens": n}, {"BLOCK": 1}, {"BLOCK": 2}, 10.0, 5.0) for n in (1, 16)
    ]
    assert (summary.measured, summary.left) == (2, 0)
    assert Tuned.load(DEVICE).lookup("double", "float32", width=8, tokens=1) == {"BLOCK": 2}


def test_wrong_values_and_failures_never_win(cache):
    tunable, timer = double({1: 10.0, 3: 1.0, 5: 1.0})
    _, (result, _) = run(tunable, timer, cache / "out.json")
    assert result.after == {"BLOCK": 1}
    assert result.candidates == 1
    assert result.rejected[0].startswith("{'BLOCK': 3}: relative error")
    assert result.rejected[1] == "{'BLOCK': 5}: RuntimeError: out of resources: shared memory"


def test_what_is_in_use_stays_unless_another_is_clearly_faster(cache):
    tunable, timer = double({1: 10.0, 2: 9.9})
    _, results = run(tunable, timer, cache / "out.json")
    assert {r.after["BLOCK"] for r in results} == {1}
    assert {r.after_us for r in results} == {10.0}


def test_what_is_in_use_is_an_earlier_measurement_where_there_is_one(cache):
    own = tuning.own_folder() / tuning.file_name(DEVICE)
    tuning.write(own, DEVICE, {Key.of("double", "float32", {"width": 8, "tokens": 1}): {"BLOCK": 2}})
    tunable, timer = double({1: 10.0, 2: 5.0, 4: 1.0})
    _, results = run(tunable, timer, own)
    assert [(r.before["BLOCK"], r.after["BLOCK"]) for r in results] == [(2, 4), (2, 4)]


def test_where_what_is_in_use_fails_the_fastest_that_works_takes_its_place(cache):
    tunable, timer = double({2: 4.0, 4: 3.0}, default=lambda key: {"BLOCK": 5})
    _, (result, _) = run(tunable, timer, cache / "out.json")
    assert (result.before, result.before_us, result.after) == ({"BLOCK": 5}, None, {"BLOCK": 4})
    assert "failed ->     3.00 us" in line(result)


def test_a_kernel_that_always_fails_stops_the_run(cache):
    tunable, timer = double({5: 1.0}, default=lambda key: {"BLOCK": 5})
    with pytest.raises(PlatformError, match="fails with every configuration"):
        run(tunable, timer, cache / "out.json")


def test_inputs_leave_the_cache_behind(cache):
    made: list[Key] = []
    tunable, timer = double({1: 1.0}, made, tokens=(1,))
    run(tunable, timer, cache / "out.json", cache_bytes=64 * 3)  # a case reads and writes 64 bytes
    assert len(made) == 6
    made.clear()
    run(tunable, timer, cache / "out.json", cache_bytes=1)
    assert len(made) == 2


def test_each_shape_is_measured_once_and_the_budget_ends_the_run(cache):
    now = iter(range(100))
    tunable, timer = double({1: 1.0})
    sites = [site(8, "a"), site(8, "b"), site(16, "c"), site(8, "d", op="other")]
    assert [dict(k.shape) for k in tunable.keys(sites)] == [
        {"tokens": 1, "width": 8}, {"tokens": 1, "width": 16}, {"tokens": 16, "width": 8}, {"tokens": 16, "width": 16},
    ]  # fmt: skip
    summary, results = run(tunable, timer, cache / "out.json", sites=sites, seconds=2.5, clock=lambda: next(now))
    assert summary.left == 4 - len(results) > 0
    assert len(tuning.read(cache / "out.json")) == len(results) > 0


def test_kernels_take_turns_within_a_budget(cache):
    first, timer = double({1: 1.0})
    second, _ = double({1: 1.0}, kernel="twice")
    results: list[TuningResult] = []
    tune([first, second], [site()], device=torch.device("cpu"), device_name=DEVICE, seconds=60, timer=timer,
         report=results.append, output=cache / "out.json", cache_bytes=1)  # fmt: skip
    assert [r.kernel for r in results] == ["double", "twice", "double", "twice"]


def test_candidates_are_compiled_before_they_run(cache):
    seen: list[tuple[int, list[int]]] = []
    made: list[Key] = []
    tunable, timer = double({1: 2.0, 2: 1.0}, made, tokens=(1,))
    run(tunable, timer, cache / "out.json",
        compile_ahead=lambda key, configs: seen.append((len(made), [c["BLOCK"] for c in configs])))  # fmt: skip
    assert seen == [(0, [1, 2])]


def test_a_model_without_tunable_kernels_is_refused(cache):
    tunable, timer = double({1: 1.0})
    with pytest.raises(PlatformError, match="no kernel that serves this model"):
        run(tunable, timer, cache / "out.json", sites=[site(op="other")])


def test_entries_that_are_not_measured_stay(cache):
    other = Key.of("gemv", "bfloat16", {"rows": 4096})
    tuning.write(cache / "out.json", DEVICE, {other: {"BLOCK": 64}})
    tunable, timer = double({1: 2.0, 2: 1.0})
    run(tunable, timer, cache / "out.json")
    assert tuning.read(cache / "out.json")[other] == {"BLOCK": 64}


def test_values_that_are_no_numbers_are_wrong():
    x = torch.ones(4)
    assert tuning.wrong(x, x, "float32") == ""
    assert "relative error nan" in tuning.wrong(x * float("nan"), x, "bfloat16")
    assert "shape [2]" in tuning.wrong((x, x[:2]), (x, x), "float32")


# --- files and lookups ----------------------------------------------------------------------------


def entries(*tokens: int, kernel: str = "k", width: int = 8) -> dict[Key, Config]:
    return {Key.of(kernel, "float32", {"width": width, "tokens": n}): {"BLOCK": n} for n in tokens}


def test_a_users_measurement_wins_over_the_shipped_one(cache):
    shipped, own = cache / "shipped", cache / "own"
    tuning.write(shipped / "Acme_1.json", DEVICE, entries(1, 16))
    tuning.write(own / "Acme_1.json", DEVICE, {next(iter(entries(16))): {"BLOCK": 99}})
    found = Tuned.load(DEVICE, shipped, own)
    assert found.lookup("k", "float32", width=8, tokens=1) == {"BLOCK": 1}
    assert found.lookup("k", "float32", width=8, tokens=16) == {"BLOCK": 99}
    assert Tuned.load("Acme 2", shipped, own).entries == {}


@pytest.mark.parametrize(("tokens", "block"), [(1, 1), (2, 16), (9, 16), (16, 16), (17, 64), (64, 64), (5000, 64)])
def test_a_lookup_takes_the_next_larger_measured_token_count(tokens, block):
    assert Tuned(entries(1, 16, 64)).lookup("k", "float32", width=8, tokens=tokens) == {"BLOCK": block}


def test_a_lookup_of_what_was_not_measured_finds_nothing():
    found = Tuned(entries(1))
    assert found.lookup("k", "float32", width=9, tokens=1) is None
    assert found.lookup("k", "bfloat16", width=8, tokens=1) is None
    assert found.lookup("other", "float32", width=8, tokens=1) is None
    assert found.lookup("k", "float32", width=8) is None


def test_a_file_is_named_by_its_device_and_readable():
    assert tuning.file_name("NVIDIA H200") == "NVIDIA_H200.json"
    assert tuning.file_name("NVIDIA A100-SXM4-80GB") == "NVIDIA_A100-SXM4-80GB.json"


def test_a_file_has_a_line_for_each_entry_in_order(cache):
    tuning.write(cache / "a.json", DEVICE, entries(16, 1))
    text = (cache / "a.json").read_text()
    assert json.loads(text)["device"] == DEVICE
    assert [line.count("config") for line in text.splitlines()] == [0, 1, 1, 0]
    assert list(tuning.read(cache / "a.json")) == list(entries(1, 16))


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"schema": 2, "entries": []}',
                                  '{"schema": 1, "entries": [{"kernel": "k"}]}'])  # fmt: skip
def test_a_file_that_is_not_ours_is_an_error_that_names_it(cache, text):
    (cache / "bad.json").write_text(text)
    with pytest.raises(PlatformError, match=r"bad\.json"):
        tuning.read(cache / "bad.json")


def test_shipped_files_are_readable():
    for file in tuning.SHIPPED.glob("*.json"):
        assert tuning.read(file)
        assert tuning.file_name(json.loads(file.read_text())["device"]) == file.name


def test_the_host_has_no_configurations():
    assert tuning.tuned(torch.device("cpu")).entries == {}


# --- the platform's kernels -----------------------------------------------------------------------

INTERPRETED = """
import sys, torch
from pathlib import Path
from hotplug.core.ops.registry import SiteSpec
from hotplug.platforms.cuda.kernels import TUNABLES
from hotplug.platforms.cuda.tuner import CompileAhead, run_once, tune
from hotplug.platforms.cuda.tuning import Key
import dataclasses
small = [dataclasses.replace(t, tokens=(1, 3)) for t in TUNABLES if t.op == "silu_mul"]
def timer(calls):
    for call in calls:
        call()
    return 1.0
results = []
tune(small, [SiteSpec("silu_mul", "act", sys.argv[1], "sm_90", {"width": 300})], device=torch.device("cpu"),
     device_name="x", seconds=100, report=results.append, output=Path(sys.argv[2]), timer=timer, cache_bytes=1)
assert len(results) == 2, results
key, good = Key.of("silu_mul", sys.argv[1], {"width": 300, "tokens": 1}), {"BLOCK": 256, "num_warps": 1}
run_once(key, good, torch.device("cpu"))
with CompileAhead(torch.device("cpu"), workers=1) as ahead:
    ahead(key, [good, {"BLOCK": 7, "num_warps": 1}])  # the second fails, which is the measurement's to say
assert all(r.candidates > 2 and not r.rejected for r in results), results
"""


@pytest.mark.parametrize("dtype", ["float16", "float32"])  # the interpreter's bfloat16 has bugs
def test_every_candidate_of_silu_mul_computes_its_reference(cache, dtype):
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", INTERPRETED, dtype, str(cache / "out.json")], capture_output=True,
                          text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_platform_offers_tuning():
    assert isinstance(CudaPlatform(), HasTuning)


# --- the command ----------------------------------------------------------------------------------


@dataclass
class Tunes(FakePlatform):
    """Says what it was asked, and reports one result."""

    kernels: Sequence[Impl] = (
        Impl("silu_mul", "acme", make=lambda _: lambda x: x),
        Impl("rms_norm", "acme", make=lambda _: lambda *a: a[0]),
    )
    asked: dict[str, Any] = field(default_factory=dict)

    def tune(self, device: DeviceInfo, sites: Sequence[SiteSpec], seconds: float,
             report: Callable[[TuningResult], None], output: Path | None) -> TuningSummary:  # fmt: skip
        self.asked = {"device": device.name, "sites": sites, "seconds": seconds, "output": output}
        report(TuningResult(kernel="silu_mul", dtype="float32", shape={"width": 64, "tokens": 1}, before={"BLOCK": 1},
                            after={"BLOCK": 2}, before_us=10.0, after_us=5.0, candidates=3,
                            rejected=("{'BLOCK': 9}: no",)))  # fmt: skip
        return TuningSummary(file=Path("tuned.json"), measured=1, left=2)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def invoke(platform: Any, *args: str) -> Any:
        for module in (discovery, bind_module):
            monkeypatch.setattr(module, "discover", lambda: candidates(platform))
        return CliRunner().invoke(app, ["tune", *args])

    return invoke


def test_the_command_asks_for_each_op_and_shape_that_a_kernel_serves(command, tiny_model):
    platform = Tunes()
    done = command(platform, str(tiny_model), "--load-format", "dummy", "--seconds", "7", "--output", "x.json")
    assert done.exit_code == 0, done.output
    assert {s.op for s in platform.asked["sites"]} == {"silu_mul", "rms_norm"}
    assert len(platform.asked["sites"]) == 2  # all layers are alike
    assert {k: v for k, v in platform.asked.items() if k != "sites"} == {
        "device": "Acme 1", "seconds": 7.0, "output": Path("x.json")}  # fmt: skip
    assert "10.00 ->     5.00 us  BLOCK 1 -> BLOCK 2 (of 3, 1 rejected)" in done.output
    assert "1 kernels and shapes measured, 1 changed; 2 were left, give more --seconds" in done.output
    assert "written to tuned.json" in done.output


def test_the_command_prints_json(command, tiny_model):
    done = command(Tunes(), str(tiny_model), "--load-format", "dummy", "--json")
    document = json.loads(done.stdout)
    assert (document["device"], document["file"], document["left"]) == ("Acme 1", "tuned.json", 2)
    assert document["results"][0]["after"] == {"BLOCK": 2}


def test_a_platform_without_tuning_is_refused_by_name(command, tiny_model):
    done = command(FakePlatform(), str(tiny_model))
    assert done.exit_code == 2
    assert "platform acme: the platform has no kernels to tune" in done.output


@pytest.mark.parametrize("seconds", ["0", "-1"])
def test_no_time_to_measure_is_refused(command, tiny_model, seconds):
    done = command(Tunes(), str(tiny_model), "--seconds", seconds)
    assert done.exit_code == 2
    assert "--seconds" in done.output
