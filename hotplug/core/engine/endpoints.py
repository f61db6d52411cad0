"""Where the engine process and its front ends meet: ZeroMQ addresses in one folder.

The engine binds `inbox`, to which every front end (and a supervisor of them) connects a PUSH socket. Each front end
binds a PULL socket at its own `outbox`, to which the engine connects; so a front end, or the engine, may end and begin
anew without the others. A supervisor that finds the engine dead connects a PUSH socket to each outbox and sends
`messages.Failed`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The meeting place of one engine and `clients` front ends, which are numbered from 0."""

    folder: str
    """An existing folder that only these processes use; its path is short enough for a socket's (some 80 bytes)."""
    clients: int = 1

    @property
    def inbox(self) -> str:
        """What the engine receives at: `messages.ToEngine`."""
        return f"ipc://{self.folder}/engine"

    def outbox(self, client: int) -> str:
        """What a front end receives at: `messages.FromEngine`. Raises ValueError if there is no such client."""
        if not 0 <= client < self.clients:
            raise ValueError(f"client {client} of {self.clients}")
        return f"ipc://{self.folder}/client-{client}"
