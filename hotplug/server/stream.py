"""From the engine's chunks to the client: server-sent events, whole answers, and clients that go away.

Hot path. One front end has to frame 20,000 tokens/s on a core it shares with the engine's client, so an
event's constant parts are encoded once a stream and each event is one `send` of ready bytes
(https://html.spec.whatwg.org/multipage/server-sent-events.html). What an event says is the business of
`chat.py` and `completions.py`.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hotplug.server.body import encode, json_response
from hotplug.server.errors import describe, log_failure

if TYPE_CHECKING:
    from hotplug.core.client.outputs import CompletionChunk
    from hotplug.core.logprobs import PromptLogprobs, TokenLogprobs

T = TypeVar("T")

_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # or nginx holds events back
    ],
}
_STARTED_AT_ONCE = 64
"""Requests that are made in one turn of the event loop, in some milliseconds."""
_LARGE_SCORES = 250
"""Prompt tokens whose log-probabilities are framed beside the event loop."""
DIRECT_SEND = "hotplug.send"
"""Key of a request's scope: the `send` that streamed events take, past the routing's wrappers, which look for the start
of a response only."""
DONE = b"data: [DONE]\n\n"


def event(data: Any) -> bytes:
    return b"data: " + encode(data) + b"\n\n"


class Events(Protocol):
    """Frames the chunks of one answer."""

    def chunk(self, chunk: CompletionChunk) -> bytes:
        """Complete events for one chunk; empty when it has nothing to show yet."""
        ...

    def end(self) -> bytes:
        """The events after the last chunk."""
        ...


class EventStream(Response):
    """An answer as server-sent events.

    The status waits for the first event, so that a refusal by the engine has its own status. A failure
    after that is an event with an error body, and the stream ends without [DONE].
    """

    def __init__(self, chunks: AsyncGenerator[CompletionChunk, None], events: Events) -> None:
        super().__init__()
        self._chunks = chunks
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._run(send, scope.get(DIRECT_SEND, send)))

    async def _run(self, send: Send, send_event: Send) -> None:
        started = False
        frame = self._events.chunk
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    if chunk.prompt_logprobs is None or len(chunk.prompt_logprobs) < _LARGE_SCORES:
                        body = frame(chunk)
                    else:
                        body = await asyncio.to_thread(frame, chunk)
                    if not body:
                        continue
                    if not started:
                        await send(_START)
                        started = True
                    await send_event({"type": "http.response.body", "body": body, "more_body": True})
            tail = self._events.end()
        except Exception as error:
            if not started:
                raise
            log_failure(error)
            tail = event(describe(error)[1])
        if not started:
            await send(_START)
        await send({"type": "http.response.body", "body": tail, "more_body": False})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None once the client is gone, when `work` has been cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merge(
    starts: Sequence[Callable[[], AsyncGenerator[CompletionChunk, None]]], count: int
) -> AsyncGenerator[CompletionChunk, None]:
    """The chunks of several prompts as they come; completion j of prompt i gets index i * count + j.

    Their requests are made a few at a turn of the event loop.
    """
    queue: asyncio.Queue[CompletionChunk | None] = asyncio.Queue()

    pumps: list[asyncio.Future[None]] = []

    async def pump(number: int, start: Callable[[], AsyncGenerator[CompletionChunk, None]]) -> None:
        async with aclosing(start()) as stream:
            async for chunk in stream:
                queue.put_nowait(dataclasses.replace(chunk, index=number * count + chunk.index))

    async def run() -> None:
        for numbered in enumerate(starts):
            pumps.append(asyncio.ensure_future(pump(*numbered)))
            if len(pumps) % max(1, _STARTED_AT_ONCE // count) == 0:
                await asyncio.sleep(0)
        await asyncio.gather(*pumps)

    everything = asyncio.ensure_future(run())
    everything.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (chunk := await queue.get()) is not None:
            yield chunk
        await everything
    finally:
        everything.cancel()
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, everything, return_exceptions=True)


class Usage:
    """Counts the tokens of one answer over its chunks; `count` completions a prompt, the prompt once."""

    def __init__(self, prompt_tokens: int, count: int) -> None:
        self.prompt_tokens = prompt_tokens
        self._count = count
        self.completion_tokens = 0
        self.cached_tokens = 0

    def add(self, chunk: CompletionChunk) -> None:
        self.completion_tokens += len(chunk.token_ids)
        if chunk.num_cached_tokens and chunk.index % self._count == 0:
            self.cached_tokens += chunk.num_cached_tokens

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclasses.dataclass(slots=True)
class Output:
    """One whole completion."""

    text: str = ""
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


async def collect(chunks: AsyncGenerator[CompletionChunk, None], count: int, usage: Usage) -> list[Output]:
    """All `count` completions of an answer, by index."""
    outputs = [Output() for _ in range(count)]
    parts: list[list[str]] = [[] for _ in range(count)]
    async with aclosing(chunks):
        async for chunk in chunks:
            usage.add(chunk)
            output = outputs[chunk.index]
            parts[chunk.index].append(chunk.text)
            if chunk.logprobs:
                output.logprobs += chunk.logprobs
            if chunk.prompt_logprobs is not None:
                output.prompt_logprobs = chunk.prompt_logprobs
            if chunk.finish_reason is not None:
                output.finish_reason, output.stop_reason = chunk.finish_reason, chunk.stop_reason
    for output, pieces in zip(outputs, parts, strict=True):
        output.text = "".join(pieces)
    return outputs


async def answer(receive: Receive, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """A JSON answer computed by `work`, which ends early when the client goes away."""
    body = await until_disconnect(receive, work)
    if body is None:
        return Response(status_code=499)  # read by nobody
    return json_response(body)


def finite(logprob: float) -> float:
    """JSON has no infinity; -9999 is what the OpenAI API says of an impossible token."""
    return max(logprob, -9999.0)
