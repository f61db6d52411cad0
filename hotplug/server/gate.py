"""What stands before the routes: the API key, readiness, and the size of a request's body.

`Gate` is a plain ASGI middleware: a Starlette `BaseHTTPMiddleware` would cost every streamed event a queue.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hotplug.core.config import parse_bytes
from hotplug.core.errors import EngineDeadError, HotplugError, NotReadyError
from hotplug.server.config import ServerConfig
from hotplug.server.errors import AuthenticationError, error_response

if TYPE_CHECKING:
    from hotplug.core.engine.async_llm import AsyncLLM

DIRECT_SEND = "hotplug.send"
"""Key of a request's scope: the `send` that streamed events take, past the routing's wrappers, which look for the start
of a response only."""
OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})
"""Answered to anyone and at any time: probes and scrapers have no key, and ask a server that starts."""


class Gate:
    """Refuses a request before its body is read."""

    def __init__(self, app: ASGIApp, llm: AsyncLLM, config: ServerConfig) -> None:
        self._app = app
        self._llm = llm
        self._keys = tuple(key.encode() for key in config.api_key)
        self._max_body = parse_bytes(config.max_body_size)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
        elif (refusal := self._refusal(scope)) is not None:
            await error_response(refusal)(scope, receive, send)
        else:
            scope[DIRECT_SEND] = send
            await self._app(scope, self._bounded(receive), send)

    def _refusal(self, scope: Scope) -> HotplugError | None:
        if self._keys:
            sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scheme, _, key = sent.partition(b" ")
            known = [hmac.compare_digest(key.strip(), ours) for ours in self._keys]
            if scheme.lower() != b"bearer" or not any(known):
                return AuthenticationError("missing or wrong API key", hint="Send it as Authorization: Bearer KEY.")
        if self._llm.failure is not None:
            return EngineDeadError("the engine is dead; see /ready and the server's log")
        if not self._llm.ready:
            return NotReadyError("the engine is starting")
        return None

    def _bounded(self, receive: Receive) -> Receive:
        left = self._max_body

        async def bounded() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                # Of all exceptions FastAPI passes only this one through the reading of a body.
                raise HTTPException(413, f"the body is larger than {self._max_body} bytes")
            return message

        return bounded
