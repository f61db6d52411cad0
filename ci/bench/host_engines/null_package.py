"""`examples/null-device` for processes that a benchmark starts, as if it were installed."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "null-device"


def lay_out(folder: Path) -> None:
    """Write to `folder` the entry of an installed distribution that points to the example's source."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = folder / f"null_device-{project['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((name, entries),) = project["entry-points"].items()
    lines = [f"[{name}]", *(f"{key} = {target}" for key, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def environment(folder: Path, *, step_ms: float = 0.0, token_us: float = 0.0) -> dict[str, str]:
    """Variables of a process that finds the null device laid out in `folder`, with steps of this time."""
    path = [str(folder), str(EXAMPLE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "NULL_DEVICE_STEP_MS": str(step_ms),
        "NULL_DEVICE_TOKEN_US": str(token_us),
    }
