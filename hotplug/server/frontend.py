"""A front end that is one of several: HTTP, templates, tokens and text in a process of its own.

The supervisor (`hotplug.server.frontends`) starts it with a socket that listens already, tells it over a pipe when to
end, and hears over the same pipe what became of the engine. Processes are forked from one that has imported this
module, so that a new one is there at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from hotplug.core.client.async_llm import AsyncLLM
from hotplug.core.config import EngineConfig
from hotplug.core.engine.endpoints import Endpoints
from hotplug.core.engine.process import freeze_started_objects
from hotplug.server import tracing
from hotplug.server.app import create_app
from hotplug.server.config import ServerConfig
from hotplug.server.figures import Figures
from hotplug.server.http import Server

if TYPE_CHECKING:
    from fastapi import FastAPI

DRAIN, QUIT = "drain", "quit"
"""To a front end: let running requests finish; do not."""
READY, FAILED, FINISHING = "ready", "failed", "finishing"
"""From it, each with a text: it serves requests; the engine is dead, or the front end cannot work with it, and why; it
takes no more requests, and how many it finishes."""


@dataclass(frozen=True, slots=True)
class FrontendSpec:
    """What a front end serves, and as which."""

    engine: EngineConfig
    server: ServerConfig
    link: Endpoints
    client: int
    generation: int
    """Which process of that number it is."""
    figures: Path


def main(spec: FrontendSpec, sock: socket.socket, pipe: Connection) -> None:
    """Entry of the process. One that takes the place of another takes no connection before it can serve it."""
    # A signal to the whole process group is the supervisor's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    llm = AsyncLLM(spec.engine, link=spec.link, client=spec.client, generation=spec.generation)

    def fail(error: Exception) -> None:
        _tell(pipe, FAILED, str(error))
        server.give_up()

    def ready() -> None:
        freeze_started_objects()
        _tell(pipe, READY, "")

    async def hold() -> None:
        waits = asyncio.ensure_future(llm.wait_ready()), asyncio.ensure_future(server.told.wait())
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if waits[0].done():
            waits[0].result()
        for each in waits:
            each.cancel()

    endpoint = spec.server.otlp_endpoint
    app = create_app(
        llm,
        spec.server,
        figures=Figures.attach(spec.figures, spec.client),
        spans=tracing.connect(endpoint) if endpoint is not None else None,
        hold=hold if spec.generation else None,
        on_ready=ready,
        on_failure=fail,
    )
    server = _Server(app, spec.server, pipe)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        try:
            runner.run(server.serve(sockets=[sock]))
        finally:
            runner.run(llm.close())


class _Server(Server):
    """Ends when the pipe says so, or closes: then the supervisor is dead."""

    def __init__(self, app: FastAPI, config: ServerConfig, pipe: Connection) -> None:
        super().__init__(app, config, lambda requests: _tell(pipe, FINISHING, str(requests)))
        self._pipe = pipe
        self.told = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pipe.fileno(), self._told)
        try:
            yield
        finally:
            loop.remove_reader(self._pipe.fileno())

    def _told(self) -> None:
        try:
            word = self._pipe.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            word = QUIT
        self.told.set()
        self.should_exit = True
        self.force_exit = self.force_exit or word == QUIT


def _tell(pipe: Connection, kind: str, text: str) -> None:
    with contextlib.suppress(OSError):  # a supervisor that is gone is noticed elsewhere
        pipe.send((kind, text))
