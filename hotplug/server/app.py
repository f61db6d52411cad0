"""The OpenAI-compatible HTTP application over one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

import hotplug
from hotplug.core.errors import EngineDeadError
from hotplug.server import chat, completions, errors, intake, routes, schemas
from hotplug.server.config import ServerConfig
from hotplug.server.figures import Figures
from hotplug.server.gate import Gate
from hotplug.server.inflight import InFlight
from hotplug.server.metrics import EngineMetrics
from hotplug.server.parsing import find_parsers
from hotplug.server.service import Service
from hotplug.server.tracing import Spans, TracedRequests

if TYPE_CHECKING:
    from hotplug.core.client.async_llm import AsyncLLM


def create_app(
    llm: AsyncLLM,
    config: ServerConfig,
    *,
    figures: Figures | None = None,
    spans: Spans | None = None,
    hold: Callable[[], Awaitable[None]] | None = None,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[Exception], None] = lambda _: None,
) -> FastAPI:
    """The application; it starts `llm` with its lifespan and closes it at the end.

    `figures` are those of several front ends, if this is one of them; `spans`, if any, get its requests. It takes
    no connection before `hold` returns.

    `on_ready` is called when the engine first answers, `on_failure` once when it cannot start or has died.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await llm.start()
            if hold is not None:
                await hold()
        except Exception as error:
            on_failure(error)
            raise
        watch = asyncio.create_task(_watch(llm, on_ready, on_failure))
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            await llm.close()
            if spans is not None:
                await asyncio.to_thread(spans.close)

    app = FastAPI(
        title="hotplug",
        version=hotplug.__version__,
        lifespan=lifespan,
        redirect_slashes=False,  # `Gate` takes them off
    )
    app.state.service = Service(llm, find_parsers(config.tool_parser, config.reasoning_parser))
    app.state.metrics = llm.observer = EngineMetrics(figures)
    for module in (chat, completions, routes):
        app.include_router(module.router)
    intake.install(app, schemas.BODIES)
    errors.install(app)
    app.state.in_flight = InFlight()
    app.add_middleware(Gate, llm=llm, config=config, in_flight=app.state.in_flight)
    if spans is not None:
        app.add_middleware(TracedRequests, spans=spans)
    return app


async def _watch(llm: AsyncLLM, on_ready: Callable[[], None], on_failure: Callable[[Exception], None]) -> None:
    try:
        await llm.wait_ready()
    except Exception as error:
        on_failure(error)
        return
    on_ready()
    on_failure(EngineDeadError(await llm.wait_dead()))
