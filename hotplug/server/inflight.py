"""Requests that are being answered, and how they end when the server does before they do.

`Gate` answers through `InFlight.run`: what it refuses is never in flight.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hotplug.core.errors import NotReadyError
from hotplug.server.errors import describe, error_response
from hotplug.server.stream import event


class ShuttingDownError(NotReadyError):
    """The server ended before it had the answer."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


@dataclass(slots=True, eq=False)
class _Request:
    """One that is being answered."""

    task: asyncio.Task[Any]
    send: Send
    start: Message | None = None
    complete: bool = False

    async def note(self, message: Message) -> None:
        """Send `message`, and remember how far the answer is."""
        if message["type"] == "http.response.start":
            self.start = message
        elif not message.get("more_body", False):
            self.complete = True
        await self.send(message)


class InFlight:
    """The requests of one server that are being answered."""

    def __init__(self) -> None:
        self._requests: set[_Request] = set()
        self._ended: set[_Request] = set()

    def __len__(self) -> int:
        return len(self._requests)

    def end(self) -> int:
        """End them all with an error each, and return how many there were."""
        self._ended |= self._requests
        for request in self._requests:
            request.task.cancel()
        return len(self._requests)

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request by `app`, unless `end` comes before."""
        task = asyncio.current_task()
        assert task is not None
        request = _Request(task, send)
        self._requests.add(request)
        try:
            await app(scope, receive, request.note)
        except asyncio.CancelledError:
            if request not in self._ended:
                raise
            await _end(request, scope, receive)
        finally:
            self._requests.discard(request)
            self._ended.discard(request)


async def _end(request: _Request, scope: Scope, receive: Receive) -> None:
    """The last that a client hears: an answer, or the last event of a stream, which then lacks its [DONE]."""
    error = ShuttingDownError()
    if request.start is None:
        await error_response(error)(scope, receive, request.send)
    elif not request.complete and _is_event_stream(request.start):
        await request.send({"type": "http.response.body", "body": event(describe(error)[1]), "more_body": False})


def _is_event_stream(start: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"])
