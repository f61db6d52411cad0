"""The interface's version: a wheel built for 1.0 goes on working, one for a newer major is refused in words."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from prompts import PROMPTS
from test_example_toy_eager import GENERATE
from throwaway import run_python, write_distribution

WHEEL = Path(__file__).parent / "data" / "toy_eager-1.0.0-py3-none-any.whl"
"""Built from examples/toy-eager for interface 1.0, and never built anew: it stands for what vendors have shipped."""

NEWER = """
class Newer:
    name, torch_device, api_version = "newer", "cpu", "2.0"
    def probe(self): raise AssertionError("a plugin that is refused is not asked")
    limits = memory = register = probe
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder that holds the wheel as installed."""
    with zipfile.ZipFile(WHEEL) as wheel:
        wheel.extractall(tmp_path)
    return tmp_path


def test_a_wheel_of_interface_1_0_serves_the_cpu_platforms_tokens(installed: Path, smollm2_path: Path) -> None:
    done = run_python(installed, "-W", "ignore", "-c", GENERATE, str(smollm2_path), json.dumps(PROMPTS[:2]))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["toy_eager"] == found["cpu"]


def test_a_wheel_of_interface_1_0_conforms(installed: Path) -> None:
    done = run_python(installed, "-m", "hotplug.cli", "conform", "--platform", "toy_eager", "--quick")
    assert "toy_eager (interface 1.0) conforms" in done.stdout, done.stdout + done.stderr


def test_a_plugin_for_a_newer_major_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write_distribution(tmp_path, "newer-platform", modules={"newer.py": NEWER},
                       entry_points={"hotplug.platforms": {"newer": "newer:Newer"}})  # fmt: skip
    listed = run_python(tmp_path, "-m", "hotplug.cli", "devices", "--json")
    (row,) = (r for r in json.loads(listed.stdout)["platforms"] if r["platform"] == "newer")
    assert row["state"] == "broken"
    assert row["reason"] == "the plugin needs interface 2.0, this hotplug has 1.1; upgrade hotplug"
    asked = run_python(tmp_path, "-m", "hotplug.cli", "explain", "smollm2", "--device", "newer")
    assert asked.returncode == 1
    assert "the plugin needs interface 2.0" in asked.stderr
    best = run_python(tmp_path, "-m", "hotplug.cli", "explain", "smollm2")
    assert "--device auto will not pass over a broken plugin" in best.stderr


def test_devices_says_which_interface_a_platform_was_written_for(installed: Path) -> None:
    listed = run_python(installed, "-m", "hotplug.cli", "devices", "--json")
    assert {r["platform"]: r["api_version"] for r in json.loads(listed.stdout)["platforms"]}["toy_eager"] == "1.0"
