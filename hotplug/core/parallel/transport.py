"""What carries messages from rank 0 to all others: each gets every message once, whole and in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hotplug.core.errors import EngineDeadError

Check = Callable[[], None]
"""Called now and then while a transport waits; it raises what ends the wait, e.g. that the other side is dead."""


class Writer(Protocol):
    """Rank 0's end."""

    def send(self, message: bytes, check: Check | None = None) -> None:
        """Give a message to every reader. Waits for room where one is behind.

        Raises TransportError where it waits longer than the transport allows, or whatever `check` raises.
        """
        ...

    def close(self) -> None:
        """Let go of it; readers that wait are not told."""
        ...


class Reader(Protocol):
    """Another rank's end."""

    def receive(self, check: Check | None = None) -> bytes:
        """The next message; waits for it, if need be for ever. Raises TransportError where one is lost or cut."""
        ...

    def close(self) -> None: ...


class TransportError(EngineDeadError):
    """A message cannot be passed on: a reader that takes none any more, or one that is not the next."""
