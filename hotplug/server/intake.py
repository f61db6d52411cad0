"""The one entry of JSON bodies: bytes to a checked `Body`, for every route that takes one.

FastAPI's own reading is not used: it parses and checks on the event loop whatever has come, and answers with every
fault there is. Here a body is read strictly (`hotplug.server.json_text`), its first fault ends it, and one that is not
small is read, and later rendered and tokenized, by a few threads of their own. Such a thread costs the event loop at
most one switch interval of the interpreter (5 ms) a turn; their number bounds what large bodies take together.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from hotplug.core.errors import RequestError
from hotplug.server import json_text
from hotplug.server.strict import Body

B = TypeVar("B", bound=Body)
T = TypeVar("T")

SMALL = 16_000
"""Bytes of a body up to which all is done on the event loop, in well under 10 ms."""
_threads = ThreadPoolExecutor(min(4, os.cpu_count() or 2), thread_name_prefix="large-body")
_REF = "#/components/schemas/{model}"


async def beside(size: int, work: Callable[[], T]) -> T:
    """The result of `work`, whose cost grows with a body of `size` bytes: beside the event loop, unless small."""
    if size <= SMALL:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_threads, work)


async def body_of(model: type[B], request: Request) -> B:
    """The body of a request as a `model`. Raises RequestError naming the field at fault."""
    _check_content_type(request.headers.get("content-type"))
    try:
        data = await request.body()
    except ClientDisconnect as e:
        raise HTTPException(400, "the client has gone") from e  # read by nobody
    if not data:
        raise RequestError("the body is empty", hint="Send a JSON object with Content-Type: application/json.")
    if len(data) <= SMALL:
        return parse(model, data)
    return await beside(len(data), lambda: parse(model, data))


def parse(model: type[B], data: bytes) -> B:
    """A body from its bytes. Raises RequestError."""
    value = json_text.read(data)
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object, sent with Content-Type: application/json")
    try:
        body = model.model_validate(value)
    except ValidationError as e:
        param, message = _first_problem(e.errors(include_url=False, include_context=False, include_input=False))
        raise RequestError(message, param=param) from None
    body.size = len(data)
    return body


class BodyRoute(APIRoute):
    """A route whose endpoint takes the request and makes the response: what FastAPI would do between, reading a body
    and finding dependencies, there is nothing to do for."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


def documented(model: type[Body]) -> dict[str, Any]:
    """`openapi_extra` of a route that takes a `model`; see `install`."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def install(app: FastAPI, bodies: Sequence[type[Body]]) -> None:
    """Let the OpenAPI document of `app` describe these bodies."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF)
            document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _check_content_type(declared: str | None) -> None:
    """Raises RequestError for what is declared to be something else than JSON in UTF-8."""
    if declared == "application/json":
        return
    kind, *parameters = (declared or "").split(";")
    kind = kind.strip().lower()
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        raise RequestError(f"Content-Type {(declared or '')[:80]!r} is not taken: the body must be JSON",
                           hint="Send Content-Type: application/json.")  # fmt: skip
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip(" \"'").lower() not in ("utf-8", "utf8", "us-ascii"):
            raise RequestError(f"charset {value[:80].strip()} is not taken: JSON is UTF-8", hint="Encode it as UTF-8.")


def _first_problem(problems: Sequence[Any]) -> tuple[str | None, str]:
    """Parameter and message of the first field that pydantic refused.

    A union reports one problem for each of its members, with the member's name in the location: what the
    locations share names the field.
    """
    location = problems[0]["loc"]
    same = [p for p in problems if p["loc"][:1] == location[:1]]
    for other in same:
        theirs = other["loc"]
        shared = 0
        while shared < min(len(location), len(theirs)) and location[shared] == theirs[shared]:
            shared += 1
        location = location[:shared]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    reasons = list(dict.fromkeys(p["msg"] for p in same))
    return param or None, f"{param}: {'; or '.join(reasons[:4])}"
