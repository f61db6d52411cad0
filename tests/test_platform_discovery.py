"""Platforms found by entry point: good, absent and broken ones, each with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_platforms import FakePlatform, candidates, loaded
from throwaway import run_python, write_distribution

from hotplug.core.errors import PlatformError
from hotplug.core.platform.base import DeviceInfo, Limits
from hotplug.core.platform.discovery import discover, incompatible

PLUGINS = """
from hotplug.vendor import DeviceInfo, Limits, MemoryInfo

class Good:
    name = "good"
    torch_device = "cpu"
    def probe(self): return [DeviceInfo(index=0, name="Good One", arch="g1")]
    def limits(self, device): return Limits(dtypes=("float32",))
    def memory(self, device): return MemoryInfo(1, 2)
    def register(self, ops): pass

class Absent(Good):
    name = "absent"
    def probe(self): return []

class Diagnosed(Absent):
    name = "diagnosed"
    def diagnose(self): return ["The driver is not loaded.", "Run modprobe."]

class BadDiagnosis(Absent):
    name = "bad_diagnosis"
    def diagnose(self): raise RuntimeError("no idea")

class Raising(Good):
    name = "raising"
    def probe(self): raise OSError("libacme.so: not found")

class TooNew(Good):
    name = "too_new"
    api_version = "2.9"

class Halfway:
    name = "halfway"
    torch_device = "cpu"
    def probe(self): return []

class Unmade(Good):
    def __init__(self): raise ValueError("no licence")
"""
ENTRY_POINTS = {
    **{name.lower(): f"plugins:{name}" for name in ("Good", "Absent", "Diagnosed", "Raising", "Halfway", "Unmade")},
    "too_new": "plugins:TooNew",
    "bad_diagnosis": "plugins:BadDiagnosis",
    "no_module": "missing:x",
    "asserting": "asserting:Platform",
    "exiting": "exiting:Platform",
}
LIST = """
import json
from hotplug.core.platform.discovery import discover
print(json.dumps({c.name: [c.distribution, [d.name for d in c.devices], c.reason, c.broken] for c in discover()}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By name: distribution, devices, reason, broken. One distribution of many plugins, next to our own."""
    folder = tmp_path_factory.mktemp("site")
    modules = {"plugins.py": PLUGINS, "asserting.py": "assert 1 == 2, 'odd'", "exiting.py": "raise SystemExit(3)"}
    write_distribution(folder, "acme-plugins", entry_points={"hotplug.platforms": ENTRY_POINTS}, modules=modules)
    done = run_python(folder, "-c", LIST)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_platform_is_found_with_its_devices_and_distribution(found: dict[str, list[Any]]) -> None:
    assert found["good"] == ["acme-plugins 1.2", ["Good One"], "", False]


def test_the_cpu_platform_is_a_plugin_like_any_other(found: dict[str, list[Any]]) -> None:
    distribution, devices, reason, broken = found["cpu"]
    assert distribution.startswith("hotplug ") and len(devices) == 1 and not reason and not broken


def test_every_entry_point_is_reported(found: dict[str, list[Any]]) -> None:
    assert found.keys() == ENTRY_POINTS.keys() | {"cpu", "cuda"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent", "no device found"),
        ("diagnosed", "The driver is not loaded.; Run modprobe."),
    ],
)
def test_a_platform_without_devices_is_absent_not_broken(found: dict[str, list[Any]], name: str, reason: str) -> None:
    assert found[name] == ["acme-plugins 1.2", [], reason, False]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "no_module",
            "the plugin failed to load (missing:x): ModuleNotFoundError: No module named 'missing'",
        ),
        ("unmade", "the plugin failed to load (plugins:Unmade): ValueError: no licence"),
        ("asserting", "the plugin failed to load (asserting:Platform): AssertionError: odd"),
        ("exiting", "the plugin failed to load (exiting:Platform): SystemExit: 3"),
        ("halfway", "the plugin lacks required members: limits, memory, register"),
        ("raising", "probe failed: OSError: libacme.so: not found"),
        ("bad_diagnosis", "diagnose failed: RuntimeError: no idea"),
        ("too_new", "the plugin needs interface 2.9, this hotplug has 2.0; upgrade hotplug"),
    ],
)
def test_a_broken_plugin_is_reported_with_its_reason(found: dict[str, list[Any]], name: str, reason: str) -> None:
    assert found[name] == ["acme-plugins 1.2", [], reason, True]


def test_two_plugins_of_one_name_are_an_error_that_names_both(tmp_path: Path) -> None:
    write_distribution(tmp_path, "one", entry_points={"hotplug.platforms": {"a": "plugins:Good"}},
                       modules={"plugins.py": PLUGINS})  # fmt: skip
    write_distribution(tmp_path, "two", entry_points={"hotplug.platforms": {"b": "more:Good"}},
                       modules={"more.py": PLUGINS})  # fmt: skip
    done = run_python(tmp_path, "-c", LIST)
    assert done.stderr.endswith(
        "two plugins provide the platform 'good':\n  - one 1.2\n  - two 1.2\nUninstall one of them.\n"
    )


def test_a_broken_plugin_that_takes_a_platforms_name_is_a_conflict_too() -> None:
    with pytest.raises(PlatformError, match="two plugins provide the platform 'acme'"):
        discover([loaded(error="ImportError: x"), loaded(FakePlatform())])


@pytest.mark.parametrize("version", ["2.0", "1.1", "1.0"])
def test_this_major_version_and_the_one_before_are_served(version: str) -> None:
    assert incompatible(version) == ""


@pytest.mark.parametrize("version", ["2.1", "3.0"])
def test_a_newer_interface_is_refused(version: str) -> None:
    assert "upgrade hotplug" in incompatible(version)


def test_an_interface_older_than_the_major_version_before_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotplug.core.platform.discovery.API_VERSION", "3.2")
    assert incompatible("1.4") == "the plugin was written for interface 1.4, this hotplug serves 2.x and up"
    assert incompatible("2.9") == ""


@pytest.mark.parametrize("version", ["one", "1", "1.0.0", None])
def test_a_version_of_another_form_is_refused(version: object) -> None:
    assert "is not of the form major.minor" in incompatible(version)


def test_a_platform_without_a_version_is_taken_for_1_0() -> None:
    class Undeclared:
        name, torch_device = "acme", "cpu"
        probe = limits = memory = register = lambda *_: []

    (candidate,) = candidates(Undeclared())
    assert (candidate.api_version, candidate.broken) == ("1.0", False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtypes": ()}, r"Limits.dtypes: at least one is needed"),
        (
            {"dtypes": ("float23",)},
            r"Limits.dtypes: 'float23' is none of float32, bfloat16, float16. Did you mean 'float32'",
        ),
        ({"kv_dtypes": ("int8",)}, r"Limits.kv_dtypes: 'int8' is none of float32, bfloat16, float16, fp8_e4m3"),
        ({"auto_dtype": "bfloat16"}, r"Limits.auto_dtype: 'bfloat16' is not in dtypes"),
        ({"index_dtype": "uint8"}, r"Limits.index_dtype: 'uint8' is neither int32 nor int64"),
        ({"block_sizes": (0,)}, r"Limits.block_sizes: a block holds at least one token"),
        ({"exec_modes": ()}, r"Limits.exec_modes: at least one is needed"),
    ],
)
def test_limits_that_make_no_sense_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlatformError, match=message):
        Limits(**{"dtypes": ("float32",), **change})


def test_a_device_info_is_a_value() -> None:
    assert DeviceInfo(index=0, name="a", arch="b") == DeviceInfo(index=0, name="a", arch="b")
