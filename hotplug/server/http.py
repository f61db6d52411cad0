"""How uvicorn runs the application, whoever holds the socket: one front end that is alone, or one of several."""

from __future__ import annotations

from typing import TYPE_CHECKING

import uvicorn

from hotplug.server.config import ServerConfig

if TYPE_CHECKING:
    from fastapi import FastAPI

_KEEP_ALIVE = 75
"""Seconds an idle connection stays open: longer than the clients' own limits, so that they close first."""
BACKLOG = 2048
"""Connections that wait to be accepted."""
FAILED_GRACE = 1
"""Seconds that clients of a dead engine get to take what they are told."""


def uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="on",
        log_level="warning" if not config.access_log else "info",
        access_log=config.access_log,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=config.shutdown_grace,
        backlog=BACKLOG,
    )


def give_up(server: uvicorn.Server) -> None:
    """End a server whose engine is dead: what is left to do for its clients is to tell them."""
    server.config.timeout_graceful_shutdown = FAILED_GRACE
    server.should_exit = True
