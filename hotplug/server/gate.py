"""What stands before the routes: methods, the API key, readiness, and what a request's headers say of its body.

`Gate` is a plain ASGI middleware: a Starlette `BaseHTTPMiddleware` would cost every streamed event a queue.
"""

from __future__ import annotations

import hmac
from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hotplug.core.config import parse_bytes
from hotplug.core.errors import EngineDeadError, NotReadyError
from hotplug.server.config import ServerConfig
from hotplug.server.errors import AuthenticationError, error_response
from hotplug.server.stream import DIRECT_SEND

if TYPE_CHECKING:
    from hotplug.core.client.async_llm import AsyncLLM
    from hotplug.server.inflight import InFlight

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})
"""Answered to anyone and at any time: probes and scrapers have no key, and ask a server that starts."""
ANY_PATH = "/*"
"""Stands for the server as a whole, which a client asks for by `OPTIONS *`."""
_DIGITS = 18
"""More are no length of a body."""
_BODIES_AT_ONCE = 32
"""The bodies that are held at a time are at most as large as so many of the largest."""


class _Headers(NamedTuple):
    """What the gate reads of a request's headers; empty: absent."""

    authorization: bytes
    content_encoding: bytes
    content_length: bytes
    expect: bytes
    transfer_encoding: bytes


_READ = tuple(name.replace("_", "-").encode() for name in _Headers._fields)


class Gate:
    """Refuses a request before its body is read; the others are in flight until they are answered."""

    def __init__(self, app: ASGIApp, llm: AsyncLLM, config: ServerConfig, in_flight: InFlight) -> None:
        self._app = app
        self._in_flight = in_flight
        self._llm = llm
        self._keys = tuple(key.encode() for key in config.api_key)
        self._max_body = parse_bytes(config.max_body_size)
        self._body_room = _BODIES_AT_ONCE * self._max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        if method != "POST":
            scope, send = _by_method(scope, send)
        if scope["path"].endswith("/") and scope["path"] != "/":
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        if scope["path"] == ANY_PATH and method == "OPTIONS":
            await Response(status_code=204, headers={"allow": "GET, HEAD, OPTIONS, POST"})(scope, receive, send)
        elif method == "OPTIONS" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
        elif (refusal := self._refusal(scope)) is not None:
            await error_response(refusal)(scope, receive, send)
        else:
            scope[DIRECT_SEND] = send
            await self._with_body(scope, receive, send)

    def _refusal(self, scope: Scope) -> Exception | None:
        found = {name: value for name, value in scope["headers"] if name in _READ}
        headers = _Headers(*map(found.get, _READ, repeat(b"")))
        if self._keys:
            scheme, _, key = headers.authorization.partition(b" ")
            known = [hmac.compare_digest(key.strip(), ours) for ours in self._keys]
            if scheme.lower() != b"bearer" or not any(known):
                return AuthenticationError("missing or wrong API key", hint="Send it as Authorization: Bearer KEY.")
        refusal = self._body_refusal(headers)
        if refusal is not None:
            return refusal
        if self._llm.failure is not None:
            return EngineDeadError("the engine is dead; see /ready and the server's log")
        if not self._llm.ready:
            return NotReadyError("the engine is starting")
        return None

    def _body_refusal(self, headers: _Headers) -> Exception | None:
        """Why a body with such headers is not read."""
        if headers.expect and headers.expect.lower() != b"100-continue":
            return HTTPException(417, f"Expect: {_shown(headers.expect)} cannot be met; 100-continue can")
        if headers.content_encoding and headers.content_encoding.lower() != b"identity":
            what = f"Content-Encoding {_shown(headers.content_encoding)} is not taken: send the body as it is"
            return HTTPException(415, what, {"accept-encoding": "identity"})
        length = headers.content_length.lstrip(b"0")
        if len(length) > _DIGITS or (length.isdigit() and int(length) > self._max_body):
            return self._too_large()
        if headers.transfer_encoding and headers.transfer_encoding.lower() != b"chunked":
            return HTTPException(501, f"Transfer-Encoding {_shown(headers.transfer_encoding)} is not taken; chunked is")
        return None

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body is larger than {self._max_body} bytes")

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, its body bounded, and those of all requests together."""
        held = 0

        async def bounded() -> Message:
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            held += size
            self._body_room -= size
            # Of all exceptions FastAPI passes only this one through the reading of a body.
            if held > self._max_body:
                raise self._too_large()
            if self._body_room < 0:
                raise HTTPException(503, "the server holds as many bodies as it can", {"retry-after": "5"})
            return message

        try:
            await self._in_flight.run(self._app, scope, bounded, send)
        finally:
            self._body_room += held


def _by_method(scope: Scope, send: Send) -> tuple[Scope, Send]:
    """The scope and `send` that answer HEAD as GET without the body, and OPTIONS with what the path allows."""
    method = scope["method"]
    no_body = method == "HEAD"

    async def bare(message: Message) -> None:
        nonlocal no_body
        if message["type"] == "http.response.start" and method == "OPTIONS" and message["status"] == 405:
            no_body = True
            allowed = [(name, value) for name, value in message["headers"] if name == b"allow"]
            message = {**message, "status": 204, "headers": allowed}
        elif message["type"] == "http.response.body" and no_body:
            message = {**message, "body": b""}
        await send(message)

    if method == "HEAD":
        return {**scope, "method": "GET"}, bare
    return scope, bare if method == "OPTIONS" else send


def _shown(value: bytes) -> str:
    """A header's value in a message."""
    return value[:80].decode("latin-1")
