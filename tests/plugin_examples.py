"""The example packages of `examples/`: as installed in a folder of a test's own, or active in this process."""

from __future__ import annotations

import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from throwaway import write_distribution

from hotplug.core.platform.discovery import Candidate, Loaded, discover
from hotplug.core.startup import installed

EXAMPLES = Path(__file__).parent.parent / "examples"


def install(folder: Path, example: str) -> None:
    """Lay out an example package in `folder` as pip would."""
    root = EXAMPLES / example
    document = tomllib.loads((root / "pyproject.toml").read_text())
    project = document["project"]
    files = [p for package in document["tool"]["setuptools"]["packages"] for p in (root / package).glob("*.py")]
    modules = {str(p.relative_to(root)): p.read_text() for p in files}
    write_distribution(folder, project["name"], version=project["version"],
                       entry_points=project["entry-points"], modules=modules)  # fmt: skip


def activate(monkeypatch: pytest.MonkeyPatch, example: str) -> None:
    """Let engines of this process find an example package, and it alone, for the length of a test."""
    root = EXAMPLES / example
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    monkeypatch.syspath_prepend(str(root))
    loaded = []
    for name, target in project["entry-points"]["hotplug.plugins"].items():
        module, _, function = target.partition(":")
        plugin = getattr(import_module(module), function)()
        loaded.append(Loaded(name, target, f"{project['name']} {project['version']}", plugin=plugin))
    monkeypatch.setattr(installed, "load_group", lambda group: loaded if group == installed.PLUGIN_GROUP else [])


def null_device(monkeypatch: pytest.MonkeyPatch, *, step: float = 0.0, token: float = 0.0) -> list[Candidate]:
    """`examples/null-device` as the only platform of engines of this process, with steps of so many seconds."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "null-device"))
    platform = import_module("null_device").NullDevice()
    platform.clock = import_module("null_device.clock").Clock(step, token)
    return discover([Loaded("null_device", "null_device:NullDevice", "null-device 1.0.0", plugin=platform)])
