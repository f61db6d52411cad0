"""What several commands print: consoles, the progress bar of a download, the line of a selected device."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from hotplug.core.config import EngineConfig
    from hotplug.core.platform.select import Selection
    from hotplug.core.weights.progress import Progress


def out() -> Console:
    """Standard output, made when asked for so that a redirected one is seen."""
    return Console(highlight=False, soft_wrap=True)


def err() -> Console:
    """Standard error: progress and status, so that output can be piped."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2, default=str))


def fetch(source: str) -> Path:
    """`resolve` with a progress bar on stderr; silent where the model is already there. Raises SourceError."""
    from hotplug.core.weights.source import pull

    with download_bar(source) as progress:
        return pull(source, progress)


def fetch_model(engine: EngineConfig) -> Path:
    """`fetch` an engine's model, after a check of what can be known without it.

    Raises ConfigError for a name that nothing brings and an unreadable template, PlatformError for a device that is
    not there, and SourceError.
    """
    from hotplug.core.startup.installed import check_names

    check_names(engine)
    selected(engine.device)
    if engine.chat_template is not None:
        from hotplug.core.text.tokenizer_files import read_template

        read_template(Path(engine.chat_template))
    return fetch(engine.model)


@contextlib.contextmanager
def download_bar(source: str) -> Iterator[Progress]:
    """A progress callback that draws a bar from its first call on."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=err(),
    )
    task = bar.add_task(f"fetching {source}", total=None)
    started = False

    def progress(done: int, total: int | None) -> None:
        nonlocal started
        if not started:
            bar.start()
            started = True
        bar.update(task, completed=done, total=total)

    try:
        yield progress
    finally:
        if started:
            bar.stop()


def selected(device: str) -> Selection:
    """The platform that `--device` means here. Raises PlatformError."""
    from hotplug.core.platform.discovery import discover
    from hotplug.core.platform.select import select

    return select(device, discover())


def device_line(selection: Selection) -> str:
    """`cpu:0  Intel Xeon (avx512), 2 cores: the only platform with a device`."""
    device = selection.device
    cores = f", {device.cores} cores" if device.cores else ""
    return f"{selection.platform.name}:{device.index}  {device.name} ({device.arch}){cores}: {selection.reason}"


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
