"""Throw-away distributions: real packages with real entry points, seen only by subprocesses that ask for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def write_distribution(
    folder: Path, name: str, *, entry_points: Mapping[str, Mapping[str, str]], modules: Mapping[str, str] | None = None,
    version: str = "1.2",
) -> None:  # fmt: skip
    """Lay out an installed distribution in `folder`: `modules` by file path, `entry_points` by group and name."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    sections = [
        f"[{group}]\n" + "".join(f"{key} = {target}\n" for key, target in entries.items())
        for group, entries in entry_points.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(sections))
    for path, source in (modules or {}).items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)


def run_python(
    folder: Path, *arguments: str, cwd: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run Python with `folder` on its path, and a cache of its own."""
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), *([inherited] if inherited else [])]),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
