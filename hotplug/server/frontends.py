"""Several front ends of one engine (`--frontends N`): this process supervises them and takes no request itself.

It starts the engine and the front ends, replaces a front end that dies, tells all of them when the engine has died, and
hands signals on. Each front end has a listening socket of its own on the same port (SO_REUSEPORT), among which the
kernel spreads connections by a hash of their addresses. One socket that all accept from would be given to whoever wakes
first: clients that connect at once would mostly end up at one front end, and stay there as long as they keep their
connections. The sockets are opened by the supervisor and stay open in it, so that connections to a front end that has
died wait for the one that takes its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import zmq

from hotplug.core.config import EngineConfig
from hotplug.core.engine import messages, process
from hotplug.core.engine.endpoints import Endpoints
from hotplug.core.errors import EngineDeadError
from hotplug.core.weights.source import resolve
from hotplug.server import frontend
from hotplug.server.config import ServerConfig
from hotplug.server.figures import Figures
from hotplug.server.http import FAILED_GRACE, say_finishing

_logger = logging.getLogger("hotplug.server")

LAST_WORDS = 0.5
"""Seconds that a dead engine's own account of its end gets to arrive."""
PARTING = 3.0
"""Seconds that front ends get to end beyond what running requests get."""
STOP_TIMEOUT = 5.0
"""Seconds that the engine gets to end when it is told to."""
MOST_STILLBORN = 3
"""Front ends of one number that may die in a row without ever having served."""


def supervise(
    engine_config: EngineConfig, config: ServerConfig, sockets: Sequence[socket.socket], on_ready: Callable[[], None]
) -> None:
    """Serve until a signal. `sockets` listen, one for each front end; `on_ready` is called when all of them serve.

    Raises EngineDeadError when the engine cannot start or dies, and when front ends cannot start.
    """
    path = resolve(engine_config.model)
    engine_config = dataclasses.replace(engine_config, model=str(path), served_model_name=engine_config.model_name)
    folder = tempfile.mkdtemp(prefix="hotplug-")
    context = zmq.Context()
    try:
        with _waking_signals() as signals:
            supervisor = _Supervisor(engine_config, config, sockets, Path(folder), context, signals)
            try:
                supervisor.serve(on_ready)
            finally:
                supervisor.end()
    finally:
        context.destroy(linger=0)
        shutil.rmtree(folder, ignore_errors=True)
    if supervisor.failure is not None:
        raise EngineDeadError(supervisor.failure)


@dataclass(slots=True)
class _FrontEnd:
    """One number's process, for as long as it lives."""

    client: int
    generation: int
    process: BaseProcess
    pipe: Connection
    ready: bool = False


class _Supervisor:
    """Its state; one thing that happens is dealt with at a time.

    To the engine it is a client like the front ends, the last of them, which asks for nothing.
    """

    def __init__(
        self,
        engine_config: EngineConfig,
        config: ServerConfig,
        sockets: Sequence[socket.socket],
        folder: Path,
        context: zmq.Context[zmq.Socket[bytes]],
        signals: _Signals,
    ) -> None:
        self.failure: str | None = None
        """Why the engine is of no use any more."""
        self._engine_config = engine_config
        self._config = config
        self._sockets = sockets
        self._signals = signals
        self._context = context
        self._link = Endpoints(str(folder), config.frontends + 1)
        self._table = folder / "figures"
        self._figures = Figures.create(self._table, config.frontends + 1)
        self._sending: list[zmq.Socket[bytes]] = []
        self._from_engine = context.socket(zmq.PULL)
        self._from_engine.bind(self._link.outbox(config.frontends))
        self._to_engine = self._push(self._link.inbox)
        self._engine: BaseProcess | None = None
        self._engine_ready = False
        self._fork = multiprocessing.get_context("forkserver")
        self._fork.set_forkserver_preload([frontend.__name__])
        self._front_ends: dict[int, _FrontEnd] = {}
        self._failed_at_start = dict.fromkeys(range(config.frontends), 0)
        self._killing: float | None = None
        """When front ends that are left are killed (`time.monotonic`); None while serving."""
        self._finishing: dict[int, int] | None = {}
        """Requests that each front end finishes, as far as they have told; None once all of them have."""

    def serve(self, on_ready: Callable[[], None]) -> None:
        """Start everything, and return when all front ends have ended."""
        self._engine = process.start(self._engine_config, self._link)
        for client in range(self._config.frontends):
            self._start(client)
        announced = False
        while self._front_ends:
            self._turn()
            if not announced and self._killing is None and all(f.ready for f in self._front_ends.values()):
                announced = True
                on_ready()

    def _turn(self) -> None:
        """Wait for what happens next, and deal with it."""
        poller = zmq.Poller()
        watched: dict[object, Callable[[], None]] = {}

        def watch(what: object, then: Callable[[], None]) -> None:
            poller.register(what, zmq.POLLIN)
            watched[what] = then

        watch(self._signals.fileno(), self._on_signal)
        if self.failure is None and self._engine is not None:
            watch(self._from_engine, self._on_message)
            watch(self._engine.sentinel, self._on_engine_exit)
        for front_end in self._front_ends.values():
            watch(front_end.pipe.fileno(), partial(self._on_word, front_end))
            watch(front_end.process.sentinel, partial(self._on_exit, front_end))
        left = None if self._killing is None else max(0.0, self._killing - time.monotonic())
        for what, _ in poller.poll(None if left is None else 1000 * left):
            watched[what]()
        if self._killing is not None and time.monotonic() >= self._killing:
            self._kill()

    # --- front ends ---

    def _start(self, client: int, generation: int = 0) -> None:
        ours, theirs = multiprocessing.Pipe()
        spec = frontend.FrontendSpec(self._engine_config, self._config, self._link, client, generation, self._table)
        with _masked(signal.SIGTERM, signal.SIGINT):  # what front ends are forked from outlives a signal to all
            forkserver.ensure_running()
        started = self._fork.Process(
            target=frontend.main, args=(spec, self._sockets[client], theirs),
            name=f"hotplug-frontend-{client}", daemon=True,
        )  # fmt: skip
        started.start()
        theirs.close()
        self._front_ends[client] = _FrontEnd(client, generation, started, ours)

    def _on_word(self, front_end: _FrontEnd) -> None:
        """A front end has something to say, or its end of the pipe is closed."""
        if front_end is not self._front_ends.get(front_end.client):
            return
        try:
            kind, text = front_end.pipe.recv()
        except (EOFError, OSError):  # it ends, or lives on out of reach
            front_end.process.join(PARTING)
            front_end.process.kill()
            self._on_exit(front_end)
            return
        if kind == frontend.READY:
            front_end.ready = True
            self._failed_at_start[front_end.client] = 0
        elif kind == frontend.FINISHING:
            self._on_finishing(front_end.client, int(text))
        elif self._killing is None:  # a front end that ends has no use for the engine, either
            self._fail(text)

    def _on_finishing(self, client: int, requests: int) -> None:
        """A front end takes no more requests; once all of them have said so, say how many are left."""
        if self._finishing is None:
            return
        self._finishing[client] = requests
        if self._finishing.keys() >= self._front_ends.keys():
            say_finishing(sum(self._finishing.values()))
            self._finishing = None

    def _on_exit(self, front_end: _FrontEnd) -> None:
        client = front_end.client
        if front_end is not self._front_ends.get(client):
            return  # the pipe told it before; another may have its place by now
        del self._front_ends[client]
        front_end.process.join()
        front_end.pipe.close()
        if self._killing is not None:
            return
        reason = f"front end {client} ended: {_exit(front_end.process.exitcode)}"
        self._to_engine.send(messages.encode(messages.ClientGone(client, front_end.generation)))
        self._failed_at_start[client] += not front_end.ready
        if self._failed_at_start[client] == MOST_STILLBORN:
            self._fail(f"{reason}, {MOST_STILLBORN} times in a row before it could serve")
            return
        _logger.error("%s; its requests are aborted and another takes its place", reason)
        self._figures.own("restarts")[0] += 1
        self._start(client, front_end.generation + 1)

    # --- the engine ---

    def _on_message(self) -> None:
        """Read what the engine says: of interest are its first and last words."""
        with contextlib.suppress(zmq.Again):
            while True:
                match messages.decode_from_engine(self._from_engine.recv(zmq.NOBLOCK)):
                    case messages.Ready():
                        self._engine_ready = True
                    case messages.Failed(text, trace, deliberate):
                        self._fail(text if deliberate else f"{text}\n{trace}")

    def _on_engine_exit(self) -> None:
        assert self._engine is not None
        self._engine.join()
        if self._engine.exitcode == process.EXIT_FAILED:
            self._from_engine.poll(1000 * LAST_WORDS)
        self._on_message()
        self._fail(f"the engine process ended without a word, {_exit(self._engine.exitcode)}")

    def _fail(self, reason: str) -> None:
        """Tell all front ends that nothing more will come of the engine, and end."""
        if self.failure is not None:
            return
        self.failure = reason
        self._finishing = None
        for client in self._front_ends:  # they keep what they heard first
            self._push(self._link.outbox(client)).send(messages.encode(messages.Failed(reason, "", True)))
        self._stop(frontend.DRAIN, FAILED_GRACE + 0.5)

    # --- the end ---

    def _on_signal(self) -> None:
        """The first lets running requests finish, a second does not."""
        if self._signals.count() == 1:
            self._stop(frontend.DRAIN, self._config.shutdown_grace + PARTING)
        else:
            self._stop(frontend.QUIT, PARTING)

    def _stop(self, word: str, seconds: float) -> None:
        """Take no more connections, and have the front ends end; they are killed after `seconds`."""
        end = time.monotonic() + seconds
        self._killing = end if self._killing is None else min(end, self._killing)
        for sock in self._sockets:
            sock.close()
        for front_end in self._front_ends.values():
            with contextlib.suppress(OSError):  # it has ended
                front_end.pipe.send(word)

    def _kill(self) -> None:
        for front_end in self._front_ends.values():
            front_end.process.kill()
            front_end.process.join()
        self._front_ends.clear()

    def end(self) -> None:
        """Whatever still runs, does not any more."""
        self._kill()
        if self._engine is None:
            return
        if self._engine_ready and self.failure is None:
            self._to_engine.send(messages.encode(messages.Stop()))
            self._engine.join(STOP_TIMEOUT)
        self._engine.kill()
        self._engine.join()

    def _push(self, address: str) -> zmq.Socket[bytes]:
        found = self._context.socket(zmq.PUSH)
        found.set(zmq.SNDHWM, 0)
        found.connect(address)
        self._sending.append(found)  # closed with the context, not by the garbage collector while they still send
        return found


def _exit(code: int | None) -> str:
    """An exit code in words."""
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


class _Signals:
    """Signals that have come; readable when there are new ones."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._count = 0

    def fileno(self) -> int:
        return self._sock.fileno()

    def count(self) -> int:
        """How many so far."""
        with contextlib.suppress(BlockingIOError):
            self._count += len(self._sock.recv(64))
        return self._count


@contextlib.contextmanager
def _waking_signals() -> Iterator[_Signals]:
    """SIGINT and SIGTERM are counted, instead of raising wherever the program is."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
        wakeup = signal.set_wakeup_fd(theirs.fileno())
        try:
            yield _Signals(ours)
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _masked(*numbers: signal.Signals) -> Iterator[None]:
    """The signals wait; processes started meanwhile never get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
