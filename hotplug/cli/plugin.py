"""`hotplug plugin`: packages that extend hotplug."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hotplug.cli.display import out

app = typer.Typer(help="Write and list packages that extend hotplug.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def plugin() -> None:
    """A group even while it has few commands."""


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the distribution, e.g. acme-npu.")],
    parent: Annotated[Path, typer.Option("--dir", metavar="FOLDER", help="Where to put it.")] = Path(),
) -> None:
    """Write a platform package that can be installed and passes its own tests."""
    from hotplug.plugins.scaffold import write_package

    folder = write_package(name, parent)
    console = out()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        console.print(f"  {file.relative_to(folder.parent)}", markup=False)
    console.print(f"wrote {folder}; next: pip install ./{folder.name}, then hotplug devices", markup=False)
