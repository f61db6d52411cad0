"""Messages to other ranks over ZeroMQ, for ranks on several hosts: a socket a reader, so that none misses one."""

from __future__ import annotations

import time

import zmq

from hotplug.core.parallel.ring import STALLED
from hotplug.core.parallel.transport import Check, TransportError

_AHEAD = 64
"""Messages that may wait for a reader on either side."""
_LOOK = 20
"""Milliseconds between two looks at `check`."""


class ZmqWriter:
    """A socket for each of `readers` readers, who connect to its entry of `addresses`.

    Each message goes with its number. `host` is what to listen on: an address of this host that the readers reach.
    """

    def __init__(self, readers: int, host: str = "127.0.0.1") -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets = [self._context.socket(zmq.PUSH) for _ in range(readers)]
        self.addresses: list[str] = []
        for socket in self._sockets:
            socket.set(zmq.SNDHWM, _AHEAD)
            port = socket.bind_to_random_port(f"tcp://{host}")
            self.addresses.append(f"tcp://{host}:{port}")
        self._number = 0

    def send(self, message: bytes, check: Check | None = None) -> None:
        """Implements `Writer`. Raises TransportError where a reader takes nothing for a minute."""
        frames = [self._number.to_bytes(8, "little"), message]
        for socket in self._sockets:
            deadline = time.monotonic() + STALLED
            while not socket.poll(_LOOK, zmq.POLLOUT):
                if check is not None:
                    check()
                if time.monotonic() > deadline:
                    raise TransportError("a rank has taken no step", where="ZeroMQ", why=f"for {STALLED:.0f} s")
            socket.send_multipart(frames, zmq.NOBLOCK)
        self._number += 1

    def close(self) -> None:
        self._context.destroy(linger=0)


class ZmqReader:
    """Connects to an address of a `ZmqWriter`, which this reader alone uses."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.set(zmq.RCVHWM, _AHEAD)
        self._socket.connect(address)
        self._number = 0

    def receive(self, check: Check | None = None) -> bytes:
        """Implements `Reader`."""
        while not self._socket.poll(None if check is None else _LOOK):
            if check is not None:
                check()
        number, message = self._socket.recv_multipart()
        if int.from_bytes(number, "little") != self._number:
            raise TransportError(
                f"message {int.from_bytes(number, 'little')} came in place of {self._number}", where="ZeroMQ"
            )
        self._number += 1
        return message

    def close(self) -> None:
        self._context.destroy(linger=0)
