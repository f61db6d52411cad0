"""The engine's side of its front ends: who gets what of a step, and never waiting for any of them.

Sends do not block. What a front end does not take is queued up to a bound; past it, the front end counts as gone: its
requests are to be aborted, its queue is dropped, and `Dropped` is the next it reads, should it read again.
"""

from __future__ import annotations

import logging
import time
from collections import deque

import zmq

from hotplug.core.engine import messages
from hotplug.core.engine.endpoints import Endpoints
from hotplug.core.request import EngineStats
from hotplug.core.scheduler.tokens import StepTokens

_logger = logging.getLogger(__name__)

SOCKET_MESSAGES = 256
"""Messages that ZeroMQ holds for a front end before its queue here begins."""
QUEUE_BYTES = 64 << 20
STATS_INTERVAL = 0.05
"""Seconds between statistics sent to a front end that has no tokens."""


class Outlet:
    """The way to one front end."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, most_bytes: int = QUEUE_BYTES) -> None:
        self._context = context
        self._address = address
        self._most_bytes = most_bytes
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._socket = self._connect()

    def _connect(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PUSH)
        socket.set(zmq.SNDHWM, SOCKET_MESSAGES)
        socket.connect(self._address)
        return socket

    @property
    def waiting(self) -> bool:
        """Whether messages wait for the socket to have room."""
        return bool(self._queue)

    def send(self, data: bytes) -> bool:
        """Send, or queue; False, and nothing is done, where the queue is full."""
        if self._queue:
            self.flush()
        if not self._queue and self._try(data):
            return True
        if self._queued_bytes + len(data) > self._most_bytes:
            return False
        self._queue.append(data)
        self._queued_bytes += len(data)
        return True

    def flush(self) -> None:
        """Send of the queue what the socket takes."""
        while self._queue and self._try(self._queue[0]):
            self._queued_bytes -= len(self._queue.popleft())

    def _try(self, data: bytes) -> bool:
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        """Drop all that is not sent."""
        self._socket.close(linger=0)
        self._queue.clear()
        self._queued_bytes = 0

    def reopen(self) -> None:
        """Drop all that is not sent, and begin anew."""
        self.close()
        self._socket = self._connect()


class Clients:
    """All front ends of an engine."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], link: Endpoints, most_bytes: int = QUEUE_BYTES) -> None:
        """`most_bytes` bounds the queue of each."""
        self._outlets = [Outlet(context, link.outbox(client), most_bytes) for client in range(link.clients)]
        self._gone = [False] * link.clients
        self._generations = [0] * link.clients
        """By client: which process of that number is here, or was last."""
        self._stats_sent = [0.0] * link.clients
        self._informed = [True] * link.clients
        """By client: whether it has the latest statistics."""
        self._overrun: list[int] = []

    @property
    def waiting(self) -> bool:
        """Whether messages wait for a socket to have room: `flush` has to be called again."""
        return any(outlet.waiting for outlet in self._outlets)

    def gone(self, client: int) -> bool:
        """Whether nobody listens: a supervisor said so, and no other front end of that number has come."""
        return not 0 <= client < len(self._outlets) or self._gone[client]

    def leave(self, client: int, generation: int = 0) -> bool:
        """A front end has died; False if another has its place already."""
        if self.gone(client) or generation < self._generations[client]:
            return False
        self._gone[client] = True
        self._outlets[client].close()
        return True

    def enter(self, client: int, generation: int = 0) -> bool:
        """A front end begins, with nothing of one before it; False if a later one has its place already."""
        if not 0 <= client < len(self._outlets) or generation < self._generations[client]:
            return False
        self._gone[client], self._generations[client] = False, generation
        self._outlets[client].reopen()
        return True

    def post(self, client: int, message: messages.FromEngine) -> None:
        if not self.gone(client):
            self._send(client, messages.encode(message))

    def post_all(self, message: messages.FromEngine) -> None:
        data = messages.encode(message)
        for client in range(len(self._outlets)):
            if not self._gone[client]:
                self._send(client, data)

    def post_step(self, gained: StepTokens, stats: EngineStats) -> None:
        """Tell each front end what its requests gained, and those that gained nothing the statistics, now and then."""
        now, several = time.monotonic(), len(self._outlets) > 1
        for client in range(len(self._outlets)):
            own = gained.of_client(client) if several else gained
            if len(own):
                self._outputs(client, own, stats, now)
            elif now - self._stats_sent[client] >= STATS_INTERVAL:
                self._inform(client, stats, now)
            else:
                self._informed[client] = False

    def post_idle(self, stats: EngineStats) -> None:
        """Tell the statistics of an engine without work to all that have not heard since it had some."""
        for client, informed in enumerate(self._informed):
            if not informed:
                self._inform(client, stats, time.monotonic())

    def changed(self) -> None:
        """Requests ended without a token: everybody's statistics are out of date."""
        self._informed = [False] * len(self._informed)

    def _inform(self, client: int, stats: EngineStats, now: float) -> None:
        """Send statistics alone; not to a front end that lags behind, whose queue they would fill."""
        self._informed[client] = False
        if not self._outlets[client].waiting:
            self._outputs(client, StepTokens(), stats, now)

    def _outputs(self, client: int, own: StepTokens, stats: EngineStats, now: float) -> None:
        self._stats_sent[client], self._informed[client] = now, True
        if not self._gone[client]:
            self._send(client, messages.encode_outputs(own, stats))

    def flush(self) -> None:
        for outlet in self._outlets:
            if outlet.waiting:
                outlet.flush()

    def take_overrun(self) -> list[int]:
        """Front ends whose requests are to be aborted because they do not take what they are sent."""
        overrun, self._overrun = self._overrun, []
        return overrun

    def _send(self, client: int, data: bytes) -> None:
        outlet = self._outlets[client]
        if not outlet.send(data):
            reason = f"front end {client} does not read what the engine sends; its requests are aborted"
            _logger.error(reason)
            outlet.reopen()
            outlet.send(messages.encode(messages.Dropped(reason)))
            self._overrun.append(client)
