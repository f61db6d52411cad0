"""`hotplug version`: what is installed, read from metadata so that nothing heavy loads."""

from __future__ import annotations

import platform
from importlib import metadata

import typer

import hotplug
from hotplug.core.platform.discovery import PLATFORM_GROUP

_PLUGIN_GROUP = "hotplug.plugins"
_LIBRARIES = ("torch", "transformers")


def version() -> None:
    """Show the versions of hotplug, torch, Python and every plugin."""
    rows = [("hotplug", hotplug.__version__)]
    rows += [(name, installed(name) or "not installed") for name in _LIBRARIES]
    rows.append(("python", platform.python_version()))
    for group, kind in ((PLATFORM_GROUP, "platform"), (_PLUGIN_GROUP, "plugin")):
        for entry in sorted(metadata.entry_points(group=group), key=lambda e: e.name):
            source = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
            rows.append((f"{kind} {entry.name}", source))
    for name, value in rows:
        typer.echo(f"{name:<16} {value}")


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, None if it is absent."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
