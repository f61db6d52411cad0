"""`hotplug plugin`: packages that extend hotplug."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from hotplug.cli.display import out, print_json

app = typer.Typer(help="Write and list packages that extend hotplug.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_plugins(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List installed packages that extend hotplug, and what each adds. Exit code 1 if one is broken."""
    from hotplug.core.platform.discovery import PLATFORM_GROUP, load_group
    from hotplug.core.startup.installed import PLUGIN_GROUP

    rows = [_describe("platform", item) for item in load_group(PLATFORM_GROUP)]
    rows += [_describe("plugin", item) for item in load_group(PLUGIN_GROUP)]
    if json:
        print_json({"schema": 1, "plugins": rows})
    else:
        for row in rows:
            adds = "; ".join(f"{kind} {', '.join(names)}" for kind, names in row["adds"].items())
            shown = f"broken: {row['error']}" if row["error"] else adds
            out().print(f"{row['kind']:<9} {row['name']:<16} {row['distribution']:<24} {shown}".rstrip(), markup=False)
    if any(row["error"] for row in rows):
        raise typer.Exit(1)


def _describe(kind: str, item: Any) -> dict[str, Any]:
    """An entry point as plain data. What a platform is able to do is `hotplug devices`' to say."""
    from hotplug.core.errors import PlatformError
    from hotplug.core.extension.points import contents

    adds, error = {}, item.error
    if kind == "plugin" and not error:
        try:
            adds = contents(item)
        except PlatformError as e:
            error = str(e)
    return {"kind": kind, "name": item.name, "distribution": item.distribution, "adds": adds, "error": error}


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
        console.print(f"  {file}", markup=False)
    path = str(folder) if folder.is_absolute() else f"./{folder}"
    console.print(f"wrote {path}; next: pip install {shlex.quote(path)}, then hotplug devices", markup=False)
