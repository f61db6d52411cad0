"""The interface's version: wheels built for 1.0 and 1.1 go on working, one for a newer major is refused in words."""

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

KERNELS_WHEEL = WHEEL.with_name("toy_kernels-1.1.0-py3-none-any.whl")
"""Built for interface 1.1, and never built anew: kernels called with constants, one of them with a state of the step,
`repack` of one tensor, and what 1.1 called by other names."""

NEWER = """
class Newer:
    name, torch_device, api_version = "newer", "cpu", "3.0"
    def probe(self): raise AssertionError("a plugin that is refused is not asked")
    limits = memory = register = probe
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder that holds the wheels as installed."""
    for file in (WHEEL, KERNELS_WHEEL):
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(tmp_path)
    return tmp_path


def test_a_wheel_of_interface_1_0_serves_the_cpu_platforms_tokens(installed: Path, smollm2_path: Path) -> None:
    done = run_python(installed, "-W", "ignore", "-c", GENERATE, str(smollm2_path), json.dumps(PROMPTS[:2]))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["toy_eager"] == found["cpu"]


def test_kernels_of_a_wheel_of_interface_1_1_serve_the_references_tokens(installed: Path, smollm2_path: Path) -> None:
    done = run_python(installed, "-W", "ignore", "-c", GENERATE.replace("toy_eager", "toy_kernels"), str(smollm2_path),
                      json.dumps(PROMPTS[:2]))  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["toy_kernels"] == found["cpu"]
    assert "toy_kernels" in found["providers"]


def test_a_wheel_of_interface_1_1_conforms(installed: Path) -> None:
    done = run_python(installed, "-m", "hotplug.cli", "conform", "--platform", "toy_kernels", "--quick", timeout=400)
    assert "toy_kernels (interface 1.1) conforms" in done.stdout, done.stdout + done.stderr


def test_a_wheel_of_interface_1_0_conforms(installed: Path) -> None:
    done = run_python(installed, "-m", "hotplug.cli", "conform", "--platform", "toy_eager", "--quick")
    assert "toy_eager (interface 1.0) conforms" in done.stdout, done.stdout + done.stderr


def test_a_plugin_for_a_newer_major_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write_distribution(tmp_path, "newer-platform", modules={"newer.py": NEWER},
                       entry_points={"hotplug.platforms": {"newer": "newer:Newer"}})  # fmt: skip
    listed = run_python(tmp_path, "-m", "hotplug.cli", "devices", "--json")
    (row,) = (r for r in json.loads(listed.stdout)["platforms"] if r["platform"] == "newer")
    assert row["state"] == "broken"
    assert row["reason"] == "the plugin needs interface 3.0, this hotplug has 2.0; upgrade hotplug"
    asked = run_python(tmp_path, "-m", "hotplug.cli", "explain", "smollm2", "--device", "newer")
    assert asked.returncode == 1
    assert "the plugin needs interface 3.0" in asked.stderr
    best = run_python(tmp_path, "-m", "hotplug.cli", "explain", "smollm2")
    assert "--device auto will not pass over a broken plugin" in best.stderr


def test_devices_says_which_interface_a_platform_was_written_for(installed: Path) -> None:
    listed = run_python(installed, "-m", "hotplug.cli", "devices", "--json")
    versions = {r["platform"]: r["api_version"] for r in json.loads(listed.stdout)["platforms"]}
    assert {name: versions[name] for name in ("toy_eager", "toy_kernels", "cpu")} == {
        "toy_eager": "1.0", "toy_kernels": "1.1", "cpu": "2.0"
    }  # fmt: skip
