"""How uvicorn runs the application, whoever holds the socket: one front end that is alone, or one of several."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from hotplug.server.config import ServerConfig
from hotplug.server.connection import Connection, State
from hotplug.server.connections import Connections

if TYPE_CHECKING:
    from fastapi import FastAPI

    from hotplug.server.inflight import InFlight

BACKLOG = 2048
"""Connections that wait to be accepted."""
FAILED_GRACE = 1
"""Seconds that clients of a dead engine get to take what they are told."""
_FAREWELL = 1.0
"""Seconds that clients get to take what they are told when their requests are cut off."""
_TICKS = 10
"""Of uvicorn's main loop, a second."""

_logger = logging.getLogger("hotplug.server")


def uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="on",
        http=Connection,
        ws="none",
        log_level="warning" if not config.access_log else "info",
        access_log=config.access_log,
        timeout_graceful_shutdown=config.shutdown_grace,
        backlog=BACKLOG,
    )


class Server(uvicorn.Server):
    """uvicorn's server with bounded connections, and an end that every client hears of.

    The first signal, or `should_exit`, stops new connections; requests in flight get the grace of the configuration,
    and are then ended with an error each. A second signal, or `force_exit`, ends them at once. `on_finishing` is told
    how many requests the grace is for.
    """

    def __init__(self, app: FastAPI, config: ServerConfig, on_finishing: Callable[[int], None]) -> None:
        super().__init__(uvicorn_config(app, config))
        self._connections = Connections(config.read_timeout)
        self.server_state = State(self._connections)
        self._in_flight: InFlight = app.state.in_flight
        self._on_finishing = on_finishing
        self._failed = False

    def give_up(self) -> None:
        """End a server whose engine is dead: what is left to do for its clients is to tell them."""
        self._failed = True
        self.config.timeout_graceful_shutdown = FAILED_GRACE
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._connections.fit()
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS == 0:
            self._connections.sweep(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn's, where a second SIGTERM would change nothing."""
        if self.should_exit:
            self.force_exit = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if not self._failed:
            self._on_finishing(len(self._in_flight))
        await self._finished()
        if cut := self._in_flight.end():
            _logger.warning("%s cut off by the end of the server", _counted(cut, "request was", "requests were"))
            await self._farewell()
        await self.lifespan.shutdown()

    async def _finished(self) -> None:
        """Wait until no connection is left, or the grace is over. The grace may become shorter meanwhile."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        ticks = 0
        while self.server_state.connections or self.server_state.tasks:
            grace = self.config.timeout_graceful_shutdown or 0
            if self.force_exit or loop.time() - begin >= grace:
                return
            await asyncio.sleep(1 / _TICKS)
            ticks += 1
            if ticks % _TICKS == 0:
                self._connections.sweep(loop.time())

    async def _farewell(self) -> None:
        """Let requests that were ended say so to their clients, as far as those read."""
        for patience in (_FAREWELL, None):
            if self.server_state.tasks:
                await asyncio.wait(list(self.server_state.tasks), timeout=patience)
            for connection in list(self.server_state.connections):
                connection.transport.abort()


def say_finishing(requests: int) -> None:
    """Tell whoever stopped the server why it goes on for a while."""
    if requests:
        _logger.warning("finishing %s; a second Ctrl-C or SIGTERM ends the server at once",
                        _counted(requests, "request", "requests"))  # fmt: skip


def _counted(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
