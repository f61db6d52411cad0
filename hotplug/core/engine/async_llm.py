"""AsyncLLM: a front end of an engine that runs in a process of its own.

Text, streams and statistics are here; the engine process sees token ids only. Every request in flight ends
with tokens or with an error: when the engine dies, all of them are told why. One front end owns its engine; several
attach to one that somebody else owns (`hotplug.core.engine.link`).
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

from hotplug.core.config import EngineConfig
from hotplug.core.engine import messages, process
from hotplug.core.engine.link import Link
from hotplug.core.engine.observer import EngineObserver
from hotplug.core.engine.outputs import CompletionChunk, RequestOutput
from hotplug.core.engine.streams import Streams
from hotplug.core.engine.submission import Submission
from hotplug.core.errors import EngineDeadError, HotplugError, NotReadyError
from hotplug.core.request import Request, SamplingParams
from hotplug.core.text.tokenizer import Tokenizer, load_tokenizer
from hotplug.core.weights.source import resolve
from hotplug.plugins.installed import check_names

STOP_TIMEOUT = 5.0
"""Seconds the engine process gets to end by itself."""
LAST_WORDS_TIMEOUT = 1.0
"""Seconds to wait for a dead engine's last message, which may still be in the socket."""
FAREWELL_TIMEOUT = 200
"""Milliseconds that closing waits for an engine of others to take the last message."""
RECEIVED = 1000
"""Messages that wait here unread before they wait at the engine."""
AT_ONCE = 16
"""Messages handled before the event loop gets its turn."""


class AsyncLLM:
    """Streams completions from an engine process. Use `start`, `wait_ready`, `stream`, `close`."""

    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int

    def __init__(
        self,
        config: EngineConfig,
        observer: EngineObserver | None = None,
        *,
        link: Link | None = None,
        client: int = 0,
        generation: int = 0,
    ) -> None:
        """Without `link` this front end starts and owns an engine. With it, it is front end number `client` of one that
        somebody else starts (`process.start`) and owns: a failure of that comes as a message of its owner. One that
        takes the place of another has the next `generation`."""
        self.config = config
        self.observer = observer
        self.ready = False
        self.failure: str | None = None
        """Why the engine could not start or died; None while it may live."""
        self._eos: tuple[int, ...] = ()
        self._client = client
        self._generation = generation
        self._streams = Streams(client)
        self._outgoing: list[Request | str] = []
        """Requests to be added and ids to be aborted, in order; sent together when the event loop is through."""
        self._ids = itertools.count()
        self._plans: list[asyncio.Future[dict[str, Any]]] = []
        self._settled = asyncio.Event()  # ready, or failed
        self._last_words = asyncio.Event()
        self._dead = asyncio.Event()
        self._folder = None if link is not None else tempfile.mkdtemp(prefix="hotplug-")
        self._link = Link(str(self._folder)) if link is None else link
        self._context = zmq.Context()
        self._send = self._context.socket(zmq.PUSH)
        self._receive = self._context.socket(zmq.PULL)
        self._process: BaseProcess | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._started = self._closing = False

    # --- life ---

    async def start(self) -> None:
        """Begin to load, and return. `wait_ready` waits; a failure is found there or in `failure`."""
        self._send.set(zmq.SNDHWM, 0)
        self._receive.set(zmq.RCVHWM, RECEIVED)
        self._receive.bind(self._link.outbox(self._client))
        self._send.connect(self._link.inbox)
        asyncio.get_running_loop().add_reader(self._descriptor, self._on_readable)
        self._started = True
        if self._folder is None:
            self._post(messages.ClientBack(self._client, self._generation))
        self._tasks = [asyncio.create_task(self._guard(self._boot()))]

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
        """Stop the engine process, unless it is others'; requests in flight get EngineDeadError."""
        if self._closing:
            return
        self._closing = True
        listening = self._folder is None and self.failure is None
        self._fail("the engine was closed")
        if self._process is not None:
            asyncio.get_running_loop().remove_reader(self._process.sentinel)
            self._post(messages.Stop())
            serving = hasattr(self, "max_model_len")  # before that it reads no messages
            await asyncio.to_thread(_end, self._process, STOP_TIMEOUT if serving else 0.0)
        elif self._started and self._folder is None:
            self._post(messages.ClientGone(self._client, self._generation))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._started:
            asyncio.get_running_loop().remove_reader(self._descriptor)
        self._context.destroy(linger=FAREWELL_TIMEOUT if listening else 0)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _boot(self) -> None:
        """Find the model, start the engine process if it is ours, and load the tokenizer while that loads weights."""
        check_names(self.config)
        path = await asyncio.to_thread(resolve, self.config.model)
        if self._folder is not None:
            config = dataclasses.replace(self.config, model=str(path), served_model_name=self.config.model_name)
            self._process = process.start(config, self._link)
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

    def stream(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[CompletionChunk, None]:
        """Chunks of all completions of a prompt, as they come; what comes while nobody reads is merged. Closing the
        generator aborts the request.

        Raises RequestError, NotReadyError or EngineDeadError; its first chunk PromptTooLongError or QueueFullError too.
        """
        self._require_ready()
        return self._run(Submission(
            request_id or self._new_id(), prompt_token_ids, params, self.tokenizer, self._eos,
            priority=priority, cache_salt=cache_salt, tags=self._streams.tags,
        ))  # fmt: skip

    async def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> RequestOutput:
        """The whole output of one prompt, text or token ids. Raises as `stream` does."""
        self._require_ready()
        text = prompt if isinstance(prompt, str) else None
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        submission = Submission(
            self._new_id(), token_ids, params or SamplingParams(), self.tokenizer, self._eos, tags=self._streams.tags
        )
        output = submission.output(text)
        async with aclosing(self._run(submission)) as chunks:
            async for chunk in chunks:
                output.add(chunk)
        return output

    async def _run(self, submission: Submission) -> AsyncGenerator[CompletionChunk, None]:
        self._require_ready()
        mailbox, running = self._streams.open(submission), len(submission.requests)
        self._queue(submission.requests)
        try:
            while running:
                chunk = await mailbox.get()
                running -= chunk.finish_reason is not None
                yield chunk
        finally:
            self._queue(self._streams.close(submission))

    def _new_id(self) -> str:
        return f"{self._client}.{self._generation}-{next(self._ids)}"

    async def explain(self) -> dict[str, Any]:
        """The bound plan as plain data."""
        self._require_ready()
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._plans.append(future)
        self._post(messages.Explain(self._client))
        return await future

    def _require_ready(self) -> None:
        if self.failure is not None:
            raise EngineDeadError(self.failure)
        if not self.ready:
            raise NotReadyError("the engine is starting")

    def _queue(self, items: Sequence[Request | str]) -> None:
        if items and not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing += items

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if self._closing:
            return
        for kind, items in itertools.groupby(outgoing, type):
            if kind is str:
                self._post(messages.Abort([item for item in items if isinstance(item, str)]))
            else:
                frames = messages.add_frames([item for item in items if isinstance(item, Request)])
                self._send.send_multipart(frames, zmq.NOBLOCK, copy=False)

    def _post(self, message: messages.ToEngine) -> None:
        """Send a message. It waits in the socket until the engine is there."""
        self._send.send(messages.encode(message), zmq.NOBLOCK)

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine, once started."""
        return self._process.pid if self._process is not None else None

    # --- what the engine says ---

    @property
    def _descriptor(self) -> int:
        descriptor = self._receive.get(zmq.FD)
        assert isinstance(descriptor, int)
        return descriptor

    def _on_readable(self) -> None:
        """Read the messages that are there. The descriptor of a ZeroMQ socket says only that there may be new ones."""
        try:
            for _ in range(AT_ONCE):
                if self._receive.closed:
                    return
                try:
                    data = self._receive.recv(zmq.NOBLOCK)
                except zmq.Again:
                    return
                self._take(messages.decode_from_engine(data))
        except Exception:
            self._fail(f"the front end broke:\n{traceback.format_exc()}")
        asyncio.get_running_loop().call_soon(self._on_readable)

    def _take(self, message: messages.FromEngine) -> None:
        match message:
            case messages.Outputs():
                self._queue(self._streams.take(message, time.monotonic(), self.observer))
                if self.observer is not None:
                    self.observer.stats(message.stats)
            case messages.Refused():
                self._streams.refuse(message.request_tag, message.to_error())
            case messages.Plan(report):
                waiter = self._plans.pop(0) if self._plans else None  # none: asked for by one that died
                if waiter is not None and not waiter.done():  # its caller may have been cancelled
                    waiter.set_result(report)
            case messages.Ready(max_model_len, vocab_size, eos_token_ids):
                self.max_model_len, self.vocab_size, self._eos = max_model_len, vocab_size, eos_token_ids
                self._settle()
            case messages.Dropped(reason):
                self._queue(self._streams.fail(reason))
            case messages.Failed(text, trace, deliberate):
                self._fail(text if deliberate else f"{text}\n{trace}")
                self._last_words.set()

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
        self._streams.fail(self.failure)
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
