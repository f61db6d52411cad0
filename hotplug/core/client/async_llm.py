"""AsyncLLM: a front end of an engine that runs in a process of its own.

Text, streams and statistics are here; the engine process sees token ids only. Every request in flight ends
with tokens or with an error: when the engine dies, all of them are told why. One front end owns its engine; several
attach to one that somebody else owns (`hotplug.core.engine.endpoints`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import shutil
import tempfile
import time
import traceback
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import zmq

from hotplug.core import checks
from hotplug.core.client.chunks import Chunks
from hotplug.core.client.forks import OwnProcess
from hotplug.core.client.observer import EngineObserver
from hotplug.core.client.outputs import CompletionChunk, RequestOutput
from hotplug.core.client.prompts import OnePrompt, read_params, read_prompt
from hotplug.core.client.question import PlanQuestion
from hotplug.core.client.streams import Streams
from hotplug.core.client.submission import Submission
from hotplug.core.client.watch import SILENT, Watch
from hotplug.core.config import EngineConfig
from hotplug.core.engine import main_script, messages, process
from hotplug.core.engine.endpoints import Endpoints
from hotplug.core.errors import EngineDeadError, HotplugError, NotReadyError, RequestError
from hotplug.core.request import MAX_ID_CHARS, Request, SamplingParams
from hotplug.core.startup.installed import check_names
from hotplug.core.text.tokenizer import Tokenizer
from hotplug.core.text.tokenizer_files import load_tokenizer
from hotplug.core.weights.source import resolve

_logger = logging.getLogger(__name__)

FAREWELL_TIMEOUT = 200
"""Milliseconds that closing waits for an engine of others to take the last message."""
RECEIVED = 1000
"""Messages that wait here unread before they wait at the engine."""
AT_ONCE = 16
"""Messages handled before the event loop gets its turn."""
REQUESTS_A_MESSAGE = 64
"""At most, so that an engine with work can go on between two messages."""
_ID = checks.text(MAX_ID_CHARS // 2)


class AsyncLLM:
    """Streams completions from an engine process. Use `start`, `wait_ready`, `stream`, `close`."""

    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int
    plan_hash: str
    """Names the bound plan."""

    def __init__(
        self,
        config: EngineConfig,
        observer: EngineObserver | None = None,
        *,
        link: Endpoints | None = None,
        client: int = 0,
        generation: int = 0,
    ) -> None:
        """Without `link` this front end starts and owns an engine. With it, it is front end number `client` of one that
        somebody else starts (`process.start`) and owns: a failure of that comes as a message of its owner. One that
        takes the place of another has the next `generation`."""
        if link is None:
            main_script.require_startable()
        self._owner = OwnProcess()
        self.config = config
        self.observer = observer
        self.ready = False
        self.failure: str | None = None
        """Why the engine could not start or died; None while it may live."""
        self._eos: tuple[int, ...] = ()
        self._client = client
        self._generation = generation
        self._streams = Streams(client)
        self._watch = Watch(config.max_queue, 1 if link is None else link.clients)
        self._outgoing: list[Request | str] = []
        """Requests to be added and ids to be aborted, in order; sent together when the event loop is through."""
        self._turn = False
        """Whether a request was sent in this turn of the event loop."""
        self._ids = itertools.count()
        self._plan = PlanQuestion(self._ask_plan)
        self._settled = asyncio.Event()  # ready, or failed
        self._last_words = asyncio.Event()
        self._dead = asyncio.Event()
        self._folder = None if link is not None else tempfile.mkdtemp(prefix="hotplug-")
        self._link = Endpoints(str(self._folder)) if link is None else link
        self._context = zmq.Context()
        self._send = self._context.socket(zmq.PUSH)
        self._receive = self._context.socket(zmq.PULL)
        self._process: BaseProcess | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._started = self._closing = False

    # --- life ---

    async def start(self) -> None:
        """Begin to load, and return. `wait_ready` waits; a failure is found there or in `failure`."""
        self._owner.require()
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
        self._owner.require()
        await self._settled.wait()
        if self.failure is not None:
            raise EngineDeadError(self.failure)

    async def wait_dead(self) -> str:
        """Wait until the engine has failed or died, and return why."""
        await self._dead.wait()
        assert self.failure is not None
        return self.failure

    async def close(self) -> None:
        """Stop the engine process, unless it is others'; requests in flight get EngineDeadError. In a fork, nothing."""
        if self._closing or not self._owner.is_here:
            return
        self._closing = True
        listening = self._folder is None and self.failure is None
        self._fail("the engine was closed")
        if self._process is not None:
            asyncio.get_running_loop().remove_reader(self._process.sentinel)
            self._post(messages.Stop())
            serving = hasattr(self, "max_model_len")  # before that it reads no messages
            await asyncio.to_thread(process.stop, self._process, process.STOP_TIMEOUT if serving else 0.0)
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
        special = self.config.chat_special_tokens
        self.tokenizer = await asyncio.to_thread(load_tokenizer, path, template, chat_special_tokens=special)
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
        prompt_token_ids: OnePrompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[CompletionChunk, None]:
        """Chunks of all completions of a prompt, as they come; what comes while nobody reads is merged. The request
        goes to the engine at once; closing the generator, or dropping it, aborts it. A prompt is given as for
        `LLM.stream`; `request_id` becomes part of the id that the engine's log shows.

        Raises RequestError, QueueFullError, NotReadyError or EngineDeadError; so does the wait for its first chunk.
        """
        self._require_ready()
        prompt, (params,) = read_prompt(prompt_token_ids), read_params(params, 1)
        self._watch.check_room(len(self._streams), params.n)
        return self._run(Submission(
            self._new_id(request_id), prompt.encoded(self.tokenizer.encode), params, self.tokenizer, self._eos,
            priority=priority, cache_salt=cache_salt or prompt.cache_salt, tags=self._streams.tags,
        ))  # fmt: skip

    async def generate(self, prompt: OnePrompt, params: SamplingParams | None = None) -> RequestOutput:
        """The whole output of one prompt, given as for `LLM.stream`. Raises as `stream` does."""
        self._require_ready()
        one, (params,) = read_prompt(prompt), read_params(params, 1)
        self._watch.check_room(len(self._streams), params.n)
        submission = Submission(
            self._new_id(), one.encoded(self.tokenizer.encode), params, self.tokenizer, self._eos,
            cache_salt=one.cache_salt, tags=self._streams.tags,
        )  # fmt: skip
        output = submission.output(one.text)
        async with aclosing(self._run(submission)) as chunks:
            async for chunk in chunks:
                output.add(chunk)
        return output

    def _run(self, submission: Submission) -> Chunks:
        """Give a submission to the engine."""
        mailbox = self._streams.open(submission)
        self._queue(submission.requests)
        if not self._turn:  # the first of this turn of the event loop goes at once, others together
            self._turn = True
            self._flush()
            asyncio.get_running_loop().call_soon(self._end_turn)
        close = partial(self._abandon, submission)
        return Chunks(mailbox, len(submission.requests), close)

    def _abandon(self, submission: Submission) -> None:
        """Nobody reads a submission any more."""
        self._queue(self._streams.close(submission, self.observer))

    def _end_turn(self) -> None:
        self._turn = False

    def _new_id(self, given: str | None = None) -> str:
        """An id that no other request has, or an abort of one would end the other."""
        own = f"{self._client}.{self._generation}-{next(self._ids)}"
        return own if given is None else f"{own}-{_ID('request_id', given)}"

    async def explain(self) -> dict[str, Any]:
        """The bound plan as plain data. Raises NotReadyError if the engine does not answer within `watch.SILENT`."""
        self._require_ready()
        return await self._plan.answer(SILENT)

    def _ask_plan(self) -> None:
        self._post(messages.Explain(self._client))
        self._watch.sent()

    @property
    def stalled(self) -> str | None:
        """Why the engine counts as not ready though it lives: it owes answers and says nothing. None where it does."""
        silence = self._watch.silence
        if silence < SILENT:
            return None
        return (f"the engine has said nothing for {silence:.0f} s, with {len(self._streams)} requests in flight: "
                "it is stopped, hangs, or is in a very long step")  # fmt: skip

    def _require_ready(self) -> None:
        self._owner.require()
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
        if self._closing or not outgoing:
            return
        for kind, items in itertools.groupby(outgoing, type):
            if kind is str:
                self._post(messages.Abort([item for item in items if isinstance(item, str)]))
            else:
                requests = [item for item in items if isinstance(item, Request)]
                for start in range(0, len(requests), REQUESTS_A_MESSAGE):
                    self._add(requests[start : start + REQUESTS_A_MESSAGE])
        self._watch.sent(sum(isinstance(item, Request) for item in outgoing))

    def _add(self, requests: list[Request]) -> None:
        """Send requests; those that cannot be are told so, and no others."""
        frames, failed = messages.add_frames(requests)
        for request, error in failed:
            if not isinstance(error, RequestError):
                error = RequestError(messages.as_text(f"the request cannot be sent to the engine: {error}"))
            self._streams.refuse(request.tag, error)
        if len(failed) < len(requests):
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
        for _ in range(AT_ONCE):
            if self._receive.closed:
                return
            try:
                data = self._receive.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._take(messages.decode_from_engine(data))
            except Exception:
                self._lose()
        asyncio.get_running_loop().call_soon(self._on_readable)

    def _lose(self) -> None:
        """A message could not be read: what it said of whom is not known. The engine lives, and so does this."""
        if not self.ready:
            self._fail(f"the front end broke:\n{traceback.format_exc()}")
            return
        _logger.exception("a message of the engine could not be read; its requests in flight end")
        self._drop("a message of the engine could not be read")

    def _drop(self, reason: str) -> None:
        """What was on its way here is lost: requests in flight end, the plan is asked for again."""
        self._queue(self._streams.fail(reason))
        self._plan.lost()

    def _take(self, message: messages.FromEngine) -> None:
        now = time.monotonic()
        match message:
            case messages.Outputs():
                self._queue(self._streams.take(message, now, self.observer))
                if self.observer is not None:
                    self.observer.stats(message.stats)
            case messages.Refused():
                self._streams.refuse(message.request_tag, message.to_error())
            case messages.PlanReport(report, error):
                self._plan.answered(report, error)
            case messages.Ready():
                self.max_model_len, self.vocab_size = message.max_model_len, message.vocab_size
                self._eos, self.plan_hash = message.eos_token_ids, message.plan_hash
                self._watch.max_num_seqs = message.max_num_seqs
                self._settle()
            case messages.Dropped(reason):
                self._drop(reason)
            case messages.Failed(text, trace, deliberate):
                self._fail(text if deliberate else f"{text}\n{trace}")
                self._last_words.set()
        self._watch.heard(now, owes=bool(self._streams) or self._plan.owed)

    # --- the end ---

    def _on_exit(self) -> None:
        """The engine process is gone. Its last message may still be on the way."""
        assert self._process is not None
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._tasks.append(asyncio.create_task(self._bury(self._process)))

    async def _bury(self, dead: BaseProcess) -> None:
        try:
            await asyncio.wait_for(self._last_words.wait(), process.LAST_WORDS_TIMEOUT)
        except TimeoutError:
            dead.join(0)
            said = main_script.NO_GUARD if dead.exitcode == main_script.EXIT_NO_GUARD else ""
            self._fail(said or f"the engine process ended without a word, {process.exit_words(dead.exitcode)}")

    def _fail(self, reason: str) -> None:
        """Tell everyone who waits that nothing more will come."""
        if self.failure is None:
            self.failure = reason
        self.ready = False
        self._settled.set()
        self._dead.set()
        self._streams.fail(self.failure)
        self._plan.fail(EngineDeadError(self.failure))
