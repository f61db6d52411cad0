"""`hotplug bench track|report`: the performance history of a checkout, by the tools that are in it (`ci/bench/track`).

They are for developers, and no part of an installed package: the checkout is that of hotplug itself where it is
installed from one, else the one that the current folder is in. This finds it and runs the tool in a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

import hotplug
from hotplug.core.errors import ConfigError

TOOLS = Path("ci") / "bench"


def track(ctx: typer.Context) -> None:
    """Measure commits of a checkout beside each other and keep the figures: `hotplug bench track --help`."""
    _run("track", ctx.args)


def report(ctx: typer.Context) -> None:
    """Write the history of a checkout as one HTML file: `hotplug bench report --help`."""
    _run("track.report", ctx.args)


def checkout() -> Path:
    """The folder of the checkout. Raises ConfigError where there is none."""
    here = Path.cwd()
    for folder in (Path(hotplug.__file__).parents[1], here, *here.parents):
        if (folder / TOOLS / "track" / "__main__.py").exists():
            return folder
    raise ConfigError(
        "the performance history is a tool of hotplug's source, which is not here",
        where=str(here),
        hint="Clone the repository, run `make test` in it once, and run the command from there.",
    )


def _run(module: str, arguments: list[str]) -> None:
    """Run a module of the tools; its exit status becomes ours."""
    folder = checkout()
    path = os.pathsep.join(filter(None, [str(folder), str(folder / TOOLS), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", module, *arguments]
    status = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
    if status:
        raise typer.Exit(status)
