"""Runs the server in this process: takes the port, starts the engine, serves until a signal, cleans up."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from hotplug.core.config import EngineConfig
from hotplug.core.errors import ConfigError
from hotplug.server import tracing
from hotplug.server.app import create_app
from hotplug.server.config import ServerConfig
from hotplug.server.connections import raise_descriptor_limit
from hotplug.server.http import BACKLOG, Server, say_finishing
from hotplug.server.parsing import find_parsers

if TYPE_CHECKING:
    from hotplug.core.client.async_llm import AsyncLLM


def run(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    *,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    `on_ready` gets the server's URL once the engine answers. A signal stops new connections; running
    requests get `shutdown_grace` seconds to finish, or until a second signal, and end with an error after that; then
    the engine is closed. Raises ConfigError when the port is taken, before anything is loaded, and the engine's own
    error when it cannot start or dies.
    """
    check(server_config)
    raise_descriptor_limit()
    with contextlib.ExitStack() as opened, _sigterm_interrupts(), contextlib.suppress(KeyboardInterrupt):
        sockets = listen_all(server_config)
        for sock in sockets:
            opened.enter_context(sock)
        # What is imported here is heavy, and the port might have been taken.
        if len(sockets) == 1:
            from hotplug.core.client.async_llm import AsyncLLM

            serve(AsyncLLM(engine_config), server_config, sockets[0], on_ready)
        else:
            from hotplug.server.frontends import supervise

            url = url_of(server_config, sockets[0])
            supervise(engine_config, server_config, sockets, lambda: on_ready(url))


def check(config: ServerConfig) -> None:
    """Raises ConfigError for what can be known before a model is fetched."""
    find_parsers(config.tool_parser, config.reasoning_parser)
    if config.otlp_endpoint is not None:
        tracing.require()
    if config.frontends > 1 and not hasattr(socket, "SO_REUSEPORT"):
        raise ConfigError("several front ends cannot share a port on this system", where="frontends",
                          why="it has no SO_REUSEPORT", hint="Leave --frontends at 1.")  # fmt: skip


def serve(llm: AsyncLLM, config: ServerConfig, sock: socket.socket, on_ready: Callable[[str], None]) -> None:
    """Serve `llm` on a listening socket. Raises what ended the engine, if anything did."""
    failures: list[Exception] = []

    def fail(error: Exception) -> None:
        failures.append(error)
        server.give_up()

    def ready() -> None:
        from hotplug.core.engine.process import freeze_started_objects  # heavy, and loaded with the engine's front end

        freeze_started_objects()
        on_ready(url_of(config, sock))

    spans = tracing.connect(config.otlp_endpoint) if config.otlp_endpoint is not None else None
    app = create_app(llm, config, spans=spans, on_ready=ready, on_failure=fail)
    server = Server(app, config, say_finishing)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        try:
            runner.run(server.serve(sockets=[sock]))
        except SystemExit:  # uvicorn's way to say that the lifespan could not start
            if not failures:
                raise
        finally:
            runner.run(llm.close())  # whose lifespan has not begun has no end
    if failures:
        raise failures[0]


def listen_all(config: ServerConfig) -> list[socket.socket]:
    """A listening socket for each front end, all on the configured address. Raises as `listen` does."""
    if config.frontends == 1:
        return [listen(config)]
    with listen(config) as alone:  # sockets that share a port share it with any other server that shares its own
        port = alone.getsockname()[1]
    with contextlib.ExitStack() as opened:
        sockets = [
            opened.enter_context(listen(dataclasses.replace(config, port=port), shared=True))
            for _ in range(config.frontends)
        ]
        opened.pop_all()
    return sockets


def listen(config: ServerConfig, *, shared: bool = False) -> socket.socket:
    """A listening socket on the configured address. Raises ConfigError naming the port and its option.

    `shared`: other sockets of this user may listen there too if they are shared themselves.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as e:
        raise ConfigError(f"cannot resolve host {config.host!r}", why=str(e.strerror), hint="Set --host.") from e
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        sock.listen(BACKLOG)  # now, not later: two sockets may be bound to one port, but not both listen
    except OSError as e:
        sock.close()
        if e.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {config.port} on {config.host} is in use",
                hint="Stop what listens there, or choose another with --port.",
            ) from e
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}",
            why=str(e.strerror),
            hint="Set --host and --port.",
        ) from e
    return sock


def url_of(config: ServerConfig, sock: socket.socket) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{sock.getsockname()[1]}"


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the process as SIGINT does, by KeyboardInterrupt: while loading, and when uvicorn raises
    the signal again after its graceful shutdown."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
