"""`hotplug doctor`: each check over made-up machines, and the command on this one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hotplug.cli import checks, environment
from hotplug.cli.environment import Environment, Plugin, Torch
from hotplug.cli.main import app

GIB = 2**30
HEALTHY = Environment(
    python=(3, 12, 1),
    torch=Torch("2.13.0+cpu"),
    transformers="5.23.0",
    extras={"cpu": (), "cuda": ()},
    nodes=frozenset(),
    plugins=(Plugin("cpu", "hotplug 0.1.0", 1),),
    plugin_conflict="",
    cache=Path("/cache"),
    cache_error="",
    disk_free=100 * GIB,
    memory_free=8 * GIB,
    open_files=65536,
)


def machine(**changes) -> Environment:
    return dataclasses.replace(HEALTHY, **changes)


def findings_of(env: Environment) -> list[checks.Finding]:
    return [finding for check in checks.CHECKS for finding in check(env)]


def worst(found: list[checks.Finding]) -> checks.Finding:
    return max(found, key=lambda f: ["ok", "note", "warn", "fail"].index(f.state))


def test_a_healthy_machine_has_nothing_but_ok():
    assert {f.state for f in findings_of(HEALTHY)} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "check", "state", "says"),
    [
        ({"python": (3, 10, 9)}, "python", "fail", "too old"),
        ({"torch": Torch(error="ModuleNotFoundError: torch")}, "torch", "fail", "not installed"),
        ({"torch": Torch("2.13.0", error="OSError: libfoo")}, "torch", "fail", "libfoo"),
        ({"torch": Torch("2.14.0")}, "torch", "warn", "2.11 to 2.13"),
        ({"torch": Torch("2.10.1")}, "torch", "warn", "2.11 to 2.13"),
        ({"torch": Torch("2.13.0", cuda="13.0")}, "torch build", "warn", "no NVIDIA driver"),
        ({"torch": Torch("2.13.0", hip="7.1")}, "torch build", "warn", "no AMD GPU driver"),
        ({"nodes": frozenset({"cuda"})}, "torch build", "warn", "built for the CPU only"),
        ({"nodes": frozenset({"rocm"}), "torch": Torch("2.13.0", cuda="13.0")}, "torch build", "warn", "CUDA 13.0"),
        ({"transformers": None}, "transformers", "fail", "not installed"),
        ({"transformers": "5.16.2"}, "transformers", "warn", "5.18 to 5.23"),
        ({"extras": {"cuda": ("triton>=3",)}}, "extra cuda", "note", "triton>=3"),
        ({"extras": {"rocm": None}}, "extra rocm", "note", "installs nothing"),
        ({"plugins": (Plugin("cpu", "", 1), Plugin("x", "x 1", 0, "no module y", True))}, "platform x", "fail",
         "no module y"),
        ({"plugins": (Plugin("cpu", "", 1), Plugin("x", "x 1", 0, "no device found"))}, "platform x", "note", "absent"),
        ({"plugins": (Plugin("cpu", "", 1, findings=("governor is powersave",)),)}, "platform cpu", "warn", "governor"),
        ({"plugins": ()}, "platforms", "fail", "no platform found a device"),
        ({"plugin_conflict": "two plugins"}, "platforms", "fail", "two plugins"),
        ({"cache_error": "no permission"}, "cache", "fail", "no permission"),
        ({"disk_free": GIB}, "cache", "warn", "1.0 GiB free"),
        ({"memory_free": GIB // 2}, "memory", "warn", "0.5 GiB free"),
        ({"open_files": 1024}, "open files", "warn", "1024"),
        ({"open_files": None}, "open files", "ok", "no limit"),
    ],
)  # fmt: skip
def test_each_trouble_is_found(changes, check, state, says):
    found = [f for f in findings_of(machine(**changes)) if f.check == check]
    assert worst(found).state == state
    assert any(says in f.message for f in found)


def test_a_trouble_comes_with_a_remedy():
    troubled = machine(torch=Torch("2.13.0", cuda="13.0"), transformers=None, cache_error="no", open_files=256)
    assert all(f.fix for f in findings_of(troubled) if f.state in ("warn", "fail"))


def test_a_missing_extra_is_a_warning_where_its_hardware_is():
    env = machine(extras={"cuda": ("triton>=3",)}, nodes=frozenset({"cuda"}), torch=Torch("2.13.0", cuda="13.0"))
    (extra,) = checks.extras(env)
    assert (extra.state, extra.fix) == ("warn", "pip install 'hotplug[cuda]'")


def test_the_driver_and_the_torch_build_agree():
    env = machine(nodes=frozenset({"cuda"}), torch=Torch("2.13.0", cuda="13.0"))
    assert [f.state for f in checks.torch_build(env)] == ["ok"]


def test_exit_code_is_1_only_where_a_check_failed(monkeypatch):
    for env, code in ((HEALTHY, 0), (machine(open_files=256), 0), (machine(transformers=None), 1)):
        monkeypatch.setattr(environment, "snapshot", lambda env=env: env)
        assert CliRunner().invoke(app, ["doctor"]).exit_code == code


def test_json_holds_every_finding(monkeypatch):
    monkeypatch.setattr(environment, "snapshot", lambda: machine(transformers=None))
    document = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert document["ok"] is False
    assert {
        "check": "transformers",
        "state": "fail",
        "message": "not installed",
        "fix": "pip install transformers",
    } in (document["findings"])


def test_the_snapshot_reads_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("HOTPLUG_CACHE", str(tmp_path / "not" / "there" / "yet"))
    env = environment.snapshot()
    assert env.torch.version and not env.torch.error
    assert any(p.name == "cpu" and p.num_devices for p in env.plugins)
    assert set(env.extras) >= {"cpu", "cuda", "rocm", "tpu", "xpu", "ray", "otel", "dev"}
    assert env.cache_error == ""
    assert env.disk_free > 0 and env.memory_free > 0
    assert not (tmp_path / "not").exists()


def test_a_cache_below_a_file_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert "not a folder" in environment._write_error(file / "cache")


def test_an_extra_without_requirements_is_not_called_complete():
    found = environment.missing_by_extra()
    assert (found["rocm"], found["ray"]) == (None, None)
    assert found["dev"] is not None


def test_missing_requirements_of_an_extra_are_named(monkeypatch):
    monkeypatch.setattr(environment, "_version", lambda name: None if name == "hypothesis" else "999")
    assert any(r.startswith("hypothesis") for r in environment.missing_by_extra()["dev"])
