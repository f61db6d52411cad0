"""Requests that are refused before the application sees them: what is wrong, and the answer that says so."""

from __future__ import annotations

from http import HTTPStatus

import httptools

from hotplug.server.body import encode
from hotplug.server.errors import error_body

MOST_QUIET = 64 << 10
"""Bytes of headers, of trailers, or of anything else that is not a body."""
MOST_HEADERS = 256
_RETRY = 5
"""Seconds a client is told to wait for room."""
_TLS_HELLO = b"\x16\x03"
_HTTP_2 = b"PRI * HTTP/2"


class RefusedError(Exception):
    """Raised in the parser's callbacks to end the connection."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    def answer(self) -> bytes:
        type_ = "service_unavailable_error" if self.status == 503 else "invalid_request_error"
        body = encode(error_body(self.message, type_, None, self.code))
        head = (
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n"
        )
        retry = f"retry-after: {_RETRY}\r\n" if self.status == 503 else ""
        return f"{head}{retry}\r\n".encode() + body


def head_too_large() -> RefusedError:
    return RefusedError(431, f"the request's line and headers are over {MOST_QUIET} bytes", "headers_too_large")


def unframed() -> RefusedError:
    return RefusedError(400, f"over {MOST_QUIET} bytes of chunk extensions or trailers")


def malformed(piece: bytes, error: httptools.HttpParserError) -> RefusedError:
    if piece.startswith(_TLS_HELLO):
        return RefusedError(400, "this port speaks plain HTTP: write http:// and not https://")
    if piece.startswith(_HTTP_2):
        return RefusedError(505, "HTTP/2 is not served here; HTTP/1.1 is", "http_version")
    if isinstance(error, httptools.HttpParserCallbackError):
        return RefusedError(400, "the request's URL is not valid")
    return RefusedError(400, f"the request is not valid HTTP: {error}")
