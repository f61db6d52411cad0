"""What rank 0 and another rank say to each other at start, and at the end: msgspec over a pair of sockets.

Steps go over a `Writer`; nothing is said here while they do, except what ends them.
"""

from __future__ import annotations

import socket
from typing import Any

import msgspec


class Begin(msgspec.Struct, tag="begin"):
    """To a rank that has come up: what to be."""

    config: dict[str, Any]
    """The fields of `EngineConfig`."""
    rank: int
    store: str
    """Where the process group meets."""
    steps: str
    """Where plans come from: the name of a ring, or a ZeroMQ address (`tcp://`)."""
    doorbell: int
    """File descriptor of the ring's doorbell."""


class Loaded(msgspec.Struct, tag="loaded"):
    """From a rank: its weights are in place."""

    plan: str
    """The hash of its kernel plan."""


class Blocks(msgspec.Struct, tag="blocks"):
    """From a rank: the KV blocks that it has room for. To it: how many all take."""

    count: int


class RankReady(msgspec.Struct, tag="ready"):
    """From a rank: it waits for steps."""


class RankFailed(msgspec.Struct, tag="failed"):
    """A rank's last words."""

    message: str
    traceback: str
    deliberate: bool
    """Whether the message is worded for the user (a HotplugError) and the traceback adds nothing."""


Message = Begin | Loaded | Blocks | RankReady | RankFailed

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


class RankChannel:
    """One end. Raises EOFError where the other is gone."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        data = _encode(message)
        try:
            self._socket.sendall(len(data).to_bytes(4, "little") + data)
        except OSError as e:
            raise EOFError from e

    def receive(self) -> Message:
        """The next message; waits for it."""
        return _decode(self._exactly(int.from_bytes(self._exactly(4), "little")))

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                part = self._socket.recv(count - len(data))
            except OSError as e:
                raise EOFError from e
            if not part:
                raise EOFError
            data += part
        return data
