"""All connections of one server process: how many there may be, and how long one may keep it waiting.

A connection is in one of these tables while the server waits for its client: for a request's headers, for its body, or
for its next request. A connection whose request is being answered is in none of them, so an answer may take as long as
it takes, and so may its reader. One sweep a second closes what has waited too long. A full server closes those that
have said nothing for longest, and refuses a new connection only when every other one has a request in flight.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    import asyncio

KEEP_ALIVE = 75.0
"""Seconds an idle connection stays open: longer than the clients' own limits, so that they close first."""
LINGER = 2.0
"""Seconds that a refused client gets to stop sending and read why."""
MIN_RATE = 1024.0
"""Bytes a second that a request's body must come at, averaged from its first byte on."""
MOST_CONNECTIONS = 16_384
"""Of one process, however many descriptors it may have."""
MOST_QUIET_OF_ALL = 64 << 20
"""Bytes of headers that are incomplete, of all connections of a process."""
RESERVE = 64
"""Descriptors for everything but connections that is opened after the start."""
QUIET_SECONDS = 60.0
"""Between two log lines of one kind."""
_WANTED_DESCRIPTORS = 65_536

_logger = logging.getLogger("hotplug.server")


class SparseLog:
    """Warnings that a client can cause at will: of each kind one line a minute, with how many it stands for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next: dict[str, float] = {}
        self._untold: dict[str, int] = {}

    def warning(self, kind: str, text: str) -> None:
        """Log `text`, unless a line of its kind was logged within the last minute."""
        now = self._clock()
        if now < self._next.get(kind, 0.0):
            self._untold[kind] = self._untold.get(kind, 0) + 1
            return
        untold = self._untold.pop(kind, 0)
        self._next[kind] = now + QUIET_SECONDS
        _logger.warning("%s%s", text, f" (and {untold} more since the last such line)" if untold else "")


class Connection(Protocol):
    """What the tables hold (`hotplug.server.connection`)."""

    loop: asyncio.AbstractEventLoop
    waiting_in: Waiting | None
    """The table that it is in; `Connections` sets it."""

    def head_timed_out(self, seconds: float) -> None:
        """Its request's headers have not come within so many seconds."""
        ...

    def check_body(self, now: float, since: float, seconds: float) -> None:
        """Refuse a body that has stalled for so many seconds, or trickles since a time."""
        ...

    def close(self) -> None: ...


Waiting = dict[Connection, float]
"""Connections in the order in which they entered, and when that was (seconds of the event loop's clock)."""


class Connections:
    """The connections of one event loop, which is the only one to touch them."""

    def __init__(self, read_timeout: float, limit: int = MOST_CONNECTIONS) -> None:
        """`read_timeout`: seconds, see `ServerConfig.read_timeout`. `limit`: how many there may be."""
        self.limit = limit
        self.log = SparseLog()
        self.quiet_bytes = 0
        """Of requests whose headers are incomplete; the connections count them."""
        self._read_timeout = read_timeout
        self._open: set[Connection] = set()
        self.heads: Waiting = {}
        """A request's headers are to come, or what is left of them."""
        self.bodies: Waiting = {}
        """The rest of a request's body is to come."""
        self.idle: Waiting = {}
        """The last request is answered."""
        self.drains: Waiting = {}
        """The last request is answered before all of it has come."""
        self.refused: Waiting = {}
        """Nothing more is taken from these; they get a moment to read why."""

    def fit(self) -> None:
        """Set the limit to what this process's descriptors leave room for."""
        allowed = descriptor_limit()
        if allowed is not None:
            room = allowed - _descriptors_in_use() + len(self._open) - min(RESERVE, allowed // 4)
            self.limit = max(1, min(MOST_CONNECTIONS, room))

    def add(self, connection: Connection) -> bool:
        """Take a new connection, in others' place if need be. False: there is no room."""
        if len(self._open) >= self.limit and not self._make_room():
            return False
        self._open.add(connection)
        return True

    def remove(self, connection: Connection) -> None:
        self._open.discard(connection)
        self.move(connection, None)

    def move(self, connection: Connection, table: Waiting | None) -> None:
        """Wait for what `table` says, from now on; None: for nothing. A wait that goes on is not begun again."""
        if connection.waiting_in is table:
            return
        if connection.waiting_in is not None:
            del connection.waiting_in[connection]
        if table is not None:
            table[connection] = connection.loop.time()
        connection.waiting_in = table

    def sweep(self, now: float) -> None:
        """Close what has kept the server waiting for too long.

        Called once a second. It looks at what it closes, and at bodies that are coming.
        """
        for connection in _older(self.heads, now - self._read_timeout):
            connection.head_timed_out(self._read_timeout)
        for table, seconds in ((self.drains, self._read_timeout), (self.idle, KEEP_ALIVE), (self.refused, LINGER)):
            for connection in _older(table, now - seconds):
                connection.close()
        for connection, since in list(self.bodies.items()):
            connection.check_body(now, since, self._read_timeout)
        if self._out_of_descriptors():
            self.limit = max(1, len(self._open) - RESERVE // 4)
            self._make_room()

    def _out_of_descriptors(self) -> bool:
        """Whether the process can open nothing more. The loop would drop new connections without a word."""
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as e:
            return e.errno in (errno.EMFILE, errno.ENFILE)
        return False

    def _make_room(self) -> bool:
        """Close a few connections that are waited for: those that have not asked anything first, the oldest first."""
        wanted = max(1, len(self._open) - self.limit + 1) + self.limit // 32
        waiting = (c for table in (self.refused, self.drains, self.heads, self.idle) for c in table)
        chosen = list(itertools.islice(waiting, wanted))
        for connection in chosen:
            self.remove(connection)  # its descriptor is given back before the next connection is taken
            connection.close()
        done = "silent and idle ones are closed to let others in" if chosen else "new ones are refused"
        self.log.warning("full" if chosen else "refused",
                         f"{self.limit} connections are open, as many as {_bound()}: {done}")  # fmt: skip
        return bool(chosen)


def _older(table: Waiting, than: float) -> list[Connection]:
    """Those that entered before a time."""
    return [c for c, since in itertools.takewhile(lambda item: item[1] <= than, table.items())]


def raise_descriptor_limit() -> None:
    """Let this process, and those it starts, open as many files as the system allows it to."""
    if sys.platform == "win32":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _WANTED_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # less than it says is allowed on some systems
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def descriptor_limit() -> int | None:
    """How many descriptors this process may have; None where there is no limit."""
    if sys.platform == "win32":
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def _descriptors_in_use() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return sum(1 for _ in Path(folder).iterdir())
    return RESERVE


def _bound() -> str:
    """What bounds the number of connections, in words."""
    allowed = descriptor_limit()
    if allowed is None or allowed > 2 * MOST_CONNECTIONS:
        return "one process takes"
    return f"its {allowed} file descriptors (ulimit -n) leave room for"
