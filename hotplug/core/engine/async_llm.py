"""AsyncLLM: the front end of an engine that runs in a process of its own.

Text, streams and statistics are here; the engine process sees token ids only. Every request in flight ends
with tokens or with an error: when the engine dies, all of them are told why.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from hotplug.core.config import EngineConfig
from hotplug.core.engine import messages, process
from hotplug.core.engine.observer import EngineObserver
from hotplug.core.engine.outputs import CompletionChunk, RequestOutput
from hotplug.core.engine.submission import Submission
from hotplug.core.errors import EngineDeadError, HotplugError, NotReadyError
from hotplug.core.request import SamplingParams, TokenDelta
from hotplug.core.text.tokenizer import Tokenizer, load_tokenizer
from hotplug.core.weights.source import resolve

STOP_TIMEOUT = 5.0
"""Seconds the engine process gets to end by itself."""
LAST_WORDS_TIMEOUT = 1.0
"""Seconds to wait for a dead engine's last message, which may still be in the socket."""


@dataclasses.dataclass(slots=True)
class _Stream:
    """One submission in flight, and where its consumer waits."""

    submission: Submission
    queue: asyncio.Queue[CompletionChunk | HotplugError]
    last_token: dict[str, float] = dataclasses.field(default_factory=dict)
    """By request id: when its latest tokens came."""


class AsyncLLM:
    """Streams completions from an engine process. Use `start`, `wait_ready`, `stream`, `close`."""

    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int

    def __init__(self, config: EngineConfig, observer: EngineObserver | None = None) -> None:
        self.config = config
        self.observer = observer
        self.ready = False
        self.failure: str | None = None
        """Why the engine could not start or died; None while it may live."""
        self._eos: tuple[int, ...] = ()
        self._streams: dict[str, _Stream] = {}
        self._ids = itertools.count()
        self._plans: list[asyncio.Future[dict[str, Any]]] = []
        self._settled = asyncio.Event()  # ready, or failed
        self._last_words = asyncio.Event()
        self._dead = asyncio.Event()
        self._folder = Path(tempfile.mkdtemp(prefix="hotplug-"))
        self._context = zmq.asyncio.Context()
        self._send = self._context.socket(zmq.PUSH)
        self._receive = self._context.socket(zmq.PULL)
        self._process: BaseProcess | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False

    # --- life ---

    async def start(self) -> None:
        """Begin to load, and return. `wait_ready` waits; a failure is found there or in `failure`."""
        for socket in (self._send, self._receive):
            socket.set(zmq.SNDHWM, 0)
            socket.set(zmq.RCVHWM, 0)
        self._send.bind(self._address("to-engine"))
        self._receive.bind(self._address("from-engine"))
        self._tasks = [asyncio.create_task(self._guard(part)) for part in (self._boot(), self._read())]

    async def wait_ready(self) -> None:
        """Wait until requests are served. Raises EngineDeadError with the reason if that will not be."""
        await self._settled.wait()
        if self.failure is not None:
            raise EngineDeadError(self.failure)

    async def wait_dead(self) -> str:
        """Wait until the engine has failed or died, and return why."""
        await self._dead.wait()
        assert self.failure is not None
        return self.failure

    async def close(self) -> None:
        """Stop the engine process; requests in flight get EngineDeadError."""
        if self._closing:
            return
        self._closing = True
        self._fail("the engine was closed")
        if self._process is not None:
            asyncio.get_running_loop().remove_reader(self._process.sentinel)
            stopping = await self._post(messages.Stop())
            await asyncio.to_thread(_end, self._process, STOP_TIMEOUT if stopping else 0.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _address(self, name: str) -> str:
        return f"ipc://{self._folder}/{name}"

    async def _boot(self) -> None:
        """Find the model, start the engine process, and load the tokenizer while that loads weights."""
        path = await asyncio.to_thread(resolve, self.config.model)
        config = dataclasses.replace(self.config, model=str(path), served_model_name=self.config.model_name)
        self._process = process.start(config, self._address("to-engine"), self._address("from-engine"))
        asyncio.get_running_loop().add_reader(self._process.sentinel, self._on_exit)
        template = Path(self.config.chat_template) if self.config.chat_template else None
        self.tokenizer = await asyncio.to_thread(load_tokenizer, path, template)
        self._settle()

    async def _guard(self, part: Coroutine[Any, Any, None]) -> None:
        """Run a part of the front end; if it breaks, nobody is left waiting."""
        try:
            await part
        except HotplugError as e:
            self._fail(str(e))
        except Exception:
            self._fail(f"the front end broke:\n{traceback.format_exc()}")

    def _settle(self) -> None:
        """Ready once both the engine and the tokenizer are."""
        if hasattr(self, "tokenizer") and hasattr(self, "max_model_len") and self.failure is None:
            self.ready = True
            self._settled.set()

    # --- requests ---

    async def stream(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[CompletionChunk, None]:
        """Chunks of all completions of a prompt, as they come. Closing the generator aborts the request.

        Raises RequestError, PromptTooLongError, QueueFullError, NotReadyError or EngineDeadError.
        """
        self._require_ready()
        submission = Submission(
            request_id or self._new_id(), prompt_token_ids, params, self.tokenizer, self._eos,
            priority=priority, cache_salt=cache_salt,
        )  # fmt: skip
        async with aclosing(self._run(submission)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> RequestOutput:
        """The whole output of one prompt, text or token ids. Raises as `stream` does."""
        self._require_ready()
        text = prompt if isinstance(prompt, str) else None
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        submission = Submission(self._new_id(), token_ids, params or SamplingParams(), self.tokenizer, self._eos)
        output = submission.output(text)
        async with aclosing(self._run(submission)) as chunks:
            async for chunk in chunks:
                output.add(chunk)
        return output

    async def _run(self, submission: Submission) -> AsyncGenerator[CompletionChunk, None]:
        stream = _Stream(submission, asyncio.Queue())
        for request in submission.requests:
            self._streams[request.id] = stream
        try:
            await self._post(messages.Add(submission.requests))
            while not (submission.finished and stream.queue.empty()):
                item = await stream.queue.get()
                if isinstance(item, HotplugError):
                    raise item
                yield item
        finally:
            left = [request.id for request in submission.requests if self._streams.pop(request.id, None)]
            if left:
                await self._post(messages.Abort(left))

    def _new_id(self) -> str:
        return f"r{next(self._ids)}"

    async def explain(self) -> dict[str, Any]:
        """The bound plan as plain data."""
        self._require_ready()
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._plans.append(future)
        await self._post(messages.Explain())
        return await future

    def _require_ready(self) -> None:
        if self.failure is not None:
            raise EngineDeadError(self.failure)
        if not self.ready:
            raise NotReadyError("the engine is starting")

    async def _post(self, message: messages.ToEngine) -> bool:
        """Send a message; false if the engine process is not there to take it. Its exit tells the rest."""
        try:
            await self._send.send(messages.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine, once started."""
        return self._process.pid if self._process is not None else None

    # --- what the engine says ---

    async def _read(self) -> None:
        while True:
            message = messages.decode_from_engine(await self._receive.recv())
            match message:
                case messages.Outputs(deltas, stats):
                    now = time.monotonic()
                    for delta in deltas:
                        await self._deliver(delta, now)
                    if self.observer is not None:
                        self.observer.stats(stats)
                case messages.Refused():
                    stream = self._streams.pop(message.request_id, None)
                    if stream is not None:
                        stream.queue.put_nowait(message.to_error())
                case messages.Plan(report):
                    waiter = self._plans.pop(0)
                    if not waiter.done():  # its caller may have been cancelled
                        waiter.set_result(report)
                case messages.Ready(max_model_len, vocab_size, eos_token_ids):
                    self.max_model_len, self.vocab_size, self._eos = max_model_len, vocab_size, eos_token_ids
                    self._settle()
                case messages.Failed(text, trace, deliberate):
                    self._fail(text if deliberate else f"{text}\n{trace}")
                    self._last_words.set()

    async def _deliver(self, delta: TokenDelta, now: float) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is None:
            return  # its client is gone; the abort is under way
        if delta.finish_reason == "error":
            del self._streams[delta.request_id]
            stream.queue.put_nowait(EngineDeadError(delta.error))
            return
        chunk = stream.submission.push(delta)
        if chunk.finish_reason is not None:
            del self._streams[delta.request_id]
            if delta.finish_reason is None:  # a stop string ended it; the engine cannot know
                await self._post(messages.Abort([delta.request_id]))
        stream.queue.put_nowait(chunk)
        if self.observer is not None:
            self._observe(self.observer, stream, delta, chunk, now)

    def _observe(
        self, observer: EngineObserver, stream: _Stream, delta: TokenDelta, chunk: CompletionChunk, now: float
    ) -> None:
        submission, last = stream.submission, stream.last_token.get(delta.request_id)
        if last is None:
            observer.queued(delta.queued)
            observer.first_token(now - submission.arrival)
        else:
            observer.inter_token(now - last, len(delta.token_ids))
        stream.last_token[delta.request_id] = now
        if chunk.finish_reason is not None:
            observer.finished(
                chunk.finish_reason,
                len(submission.prompt_token_ids),
                submission.completions[delta.request_id].num_tokens,
                now - submission.arrival,
            )

    # --- the end ---

    def _on_exit(self) -> None:
        """The engine process is gone. Its last message may still be on the way."""
        assert self._process is not None
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._tasks.append(asyncio.create_task(self._bury(self._process)))

    async def _bury(self, dead: BaseProcess) -> None:
        try:
            await asyncio.wait_for(self._last_words.wait(), LAST_WORDS_TIMEOUT)
        except TimeoutError:
            dead.join(0)
            self._fail(f"the engine process ended without a word, {_exit(dead.exitcode)}")

    def _fail(self, reason: str) -> None:
        """Tell everyone who waits that nothing more will come."""
        if self.failure is None:
            self.failure = reason
        self.ready = False
        self._settled.set()
        self._dead.set()
        for stream in {id(s): s for s in self._streams.values()}.values():
            stream.queue.put_nowait(EngineDeadError(self.failure))
        self._streams.clear()
        for future in self._plans:
            if not future.done():
                future.set_exception(EngineDeadError(self.failure))
        self._plans.clear()


def _exit(code: int | None) -> str:
    """An exit code in words."""
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _end(engine: BaseProcess, patience: float) -> None:
    """Wait for the process to stop; past `patience` seconds, make it."""
    engine.join(patience)
    if engine.is_alive():
        engine.kill()
        engine.join()
