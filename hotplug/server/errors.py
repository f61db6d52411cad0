"""Exceptions to answers: the one place that knows which error gets which HTTP status.

Every answer that is not a success has the OpenAI shape
`{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from hotplug.core.errors import (
    EngineDeadError,
    HotplugError,
    NotReadyError,
    PromptTooLongError,
    QueueFullError,
    RequestError,
    UnknownModelError,
)
from hotplug.server.body import json_response

logger = logging.getLogger("hotplug.server")

_MESSAGE, _PARAM = 1000, 200
"""Characters of an error's message and of the parameter that it names: either may quote what came."""
NOT_READY_RETRY = 5
"""Seconds a client is told to wait while the engine starts."""


class AuthenticationError(HotplugError):
    """The API key is missing or wrong."""


class _Kind(NamedTuple):
    status: int
    type: str
    code: str | None


_KINDS: tuple[tuple[type[Exception], _Kind], ...] = (  # the first match counts: subclasses first
    (PromptTooLongError, _Kind(400, "invalid_request_error", "context_length_exceeded")),
    (UnknownModelError, _Kind(404, "invalid_request_error", "model_not_found")),
    (RequestError, _Kind(400, "invalid_request_error", None)),
    (AuthenticationError, _Kind(401, "authentication_error", "invalid_api_key")),
    (QueueFullError, _Kind(429, "rate_limit_error", "rate_limit_exceeded")),
    (NotReadyError, _Kind(503, "service_unavailable_error", "not_ready")),
    (EngineDeadError, _Kind(500, "server_error", "engine_dead")),
    (HotplugError, _Kind(500, "server_error", "engine_error")),
)
_HTTP_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}


def error_body(message: str, type_: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and extra headers that answer `error`.

    The reasons of a server-side failure (tracebacks, paths) go to the log and not to the client.
    """
    if isinstance(error, HTTPException):
        type_ = _HTTP_TYPES.get(error.status_code, "invalid_request_error")
        return error.status_code, error_body(error.detail, type_, None, None), dict(error.headers or {})
    kind = next((kind for cls, kind in _KINDS if isinstance(error, cls)), None)
    if kind is None:
        return 500, error_body("internal error", "server_error", None, "internal_error"), {}
    assert isinstance(error, HotplugError)
    message = shortened(first_line(error.what) if kind.status >= 500 else str(error), _MESSAGE)
    param = getattr(error, "param", None)
    headers: dict[str, str] = {}
    if isinstance(error, QueueFullError):
        headers["retry-after"] = str(error.retry_after)
    elif isinstance(error, NotReadyError):
        headers["retry-after"] = str(NOT_READY_RETRY)
    elif isinstance(error, AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    return kind.status, error_body(message, kind.type, param and shortened(param, _PARAM), kind.code), headers


def shortened(text: str, most: int) -> str:
    """A text without its middle where it is longer; its half surrogates, which no answer can hold, replaced."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return text.encode(errors="replace").decode()


def first_line(failure: str) -> str:
    """A failure without the traceback that may follow it."""
    return failure.partition("\n")[0]


def log_failure(error: Exception) -> None:
    """Log what the client is not told: the traceback and reasons of a failure on our side."""
    if describe(error)[0] == 500:
        logger.error("request failed: %s", error, exc_info=error)


def error_response(error: Exception) -> Response:
    status, body, headers = describe(error)
    return json_response(body, status, headers)


def install(app: FastAPI) -> None:
    """Give `app` the handlers that turn every exception into an OpenAI error body."""

    async def deliberate(_: Request, error: Exception) -> Response:
        log_failure(error)
        return error_response(error)

    async def unexpected(_: Request, error: Exception) -> Response:
        return error_response(error)  # Starlette raises it again, so that the web server logs it

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status, body, headers = describe(error)
        if status == 404:
            body["error"].update(message=f"no route {request.url.path}", code="unknown_route")
        elif status == 405:
            body["error"].update(message=f"{request.method} is not allowed here")
            headers = {name: _allowed(value) if name.lower() == "allow" else value for name, value in headers.items()}
        return json_response(body, status, headers)

    app.add_exception_handler(HotplugError, deliberate)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def _allowed(methods: str) -> str:
    """What a path allows, with the methods that are answered for every route (`hotplug.server.gate`)."""
    return ", ".join([methods, *(["HEAD"] if methods == "GET" else []), "OPTIONS"])
