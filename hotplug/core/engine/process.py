"""The engine process: builds an EngineCore, then serves messages and steps until told to stop.

The loop waits for the device and for work, never for a front end (`clients`). Out of work, it looks for messages
without pause for `SPIN` seconds, since the next request often follows the last at once, then blocks. It ends by itself
when its parent dies, and never without a last message that says why.
"""

from __future__ import annotations

import atexit
import gc
import logging
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Sequence

import zmq

from hotplug.core.config import EngineConfig
from hotplug.core.engine import main_script, messages
from hotplug.core.engine.clients import Clients
from hotplug.core.engine.core import EngineCore
from hotplug.core.engine.endpoints import Endpoints
from hotplug.core.errors import EngineDeadError, HotplugError, QueueFullError, RequestError
from hotplug.core.request import Request
from hotplug.core.scheduler.tokens import CLIENT_SHIFT

STOP_TIMEOUT = 5.0
"""Seconds the engine process gets to end by itself."""
LAST_WORDS_TIMEOUT = 1.0
"""Seconds to wait for a dead engine's last message, which may still be in the socket."""
_logger = logging.getLogger(__name__)

EXIT_FAILED = 1
SPIN = 0.002
"""Seconds of looking for messages before blocking."""
MESSAGES_A_STEP = 64
READ_SECONDS = 0.01
"""Messages, and seconds of handling them, between two steps at most: a flood does not hold up running requests."""
RETRY_MS = 10
"""Milliseconds between attempts to send what a front end did not take, while there is no work."""


def main(config: EngineConfig, link: Endpoints) -> None:
    """Entry of the process."""
    # A signal to the whole process group is the front end's to handle: it lets running requests finish first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    context = zmq.Context()
    inbox = context.socket(zmq.PULL)
    inbox.set(zmq.RCVHWM, 0)
    inbox.bind(link.inbox)
    clients = Clients(context, link)
    try:
        EngineProcess(config, inbox, clients).run()
    except Exception as e:
        text, trace = messages.as_text(str(e)), messages.as_text(traceback.format_exc())
        clients.post_all(messages.Failed(text, trace, isinstance(e, HotplugError)))
        raise SystemExit(EXIT_FAILED) from e
    finally:
        context.destroy(linger=2000)


class EngineProcess:
    """The loop around one EngineCore."""

    def __init__(self, config: EngineConfig, inbox: zmq.Socket[bytes], clients: Clients) -> None:
        self._inbox = inbox
        self._clients = clients
        self._poller = zmq.Poller()
        self._poller.register(inbox, zmq.POLLIN)
        parent = multiprocessing.parent_process()
        self._parent_pid = None if parent is None else parent.pid
        if parent is not None:
            self._poller.register(parent.sentinel, zmq.POLLIN)
        self._core = EngineCore(config)
        self._ranks = self._core.sentinels
        for sentinel in self._ranks:
            self._poller.register(sentinel, zmq.POLLIN)
        freeze_started_objects()
        self._stopped = False

    def run(self) -> None:
        """Serve until stopped, or until the parent is gone."""
        core, clients = self._core, self._clients
        clients.post_all(self._ready())
        while not self._stopped:
            if not core.has_work:
                clients.post_idle(core.stats())
                self._wait()
            self._read()
            clients.flush()
            if core.has_work:
                clients.post_step(core.step(), core.stats())
                core.timer.sent()
                if not core.has_work:
                    clients.changed()  # what they have is from before this step's end
            for client in clients.take_overrun():
                self._abort_client(client)

    def _wait(self) -> None:
        """Return when there is a message, or when the parent is gone: look for one first, then block."""
        deadline = time.monotonic() + SPIN
        while time.monotonic() < deadline:
            if self._has_message():
                return
        self._poller.poll(RETRY_MS if self._clients.waiting else None)
        if self._ranks:
            self._core.check()

    def _has_message(self) -> bool:
        events = self._inbox.get(zmq.EVENTS)
        return isinstance(events, int) and bool(events & zmq.POLLIN)  # bytes are what other options have

    def _read(self) -> None:
        """Handle the messages that are there. One that fails is logged, and costs nobody else anything."""
        if os.getppid() != (self._parent_pid or os.getppid()):
            self._stopped = True
        end = time.monotonic() + READ_SECONDS if self._core.has_work else math.inf
        for _ in range(MESSAGES_A_STEP):
            if self._stopped or not self._has_message() or time.monotonic() > end:
                return
            frames = self._inbox.recv_multipart(copy=False)
            try:
                self._handle(messages.decode_to_engine(frames), frames)
            except EngineDeadError:
                raise
            except Exception:
                _logger.exception("a message to the engine failed and is dropped")

    def _handle(self, message: messages.ToEngine, frames: Sequence[zmq.Frame]) -> None:
        match message:
            case messages.Add():
                for tag, request in messages.received(message, frames):
                    self._add(tag, request)
            case messages.Abort(request_ids):
                for request_id in request_ids:
                    self._core.abort(request_id)
                self._clients.changed()
            case messages.Explain(client):
                self._explain(client)
            case messages.ClientGone(client, generation):
                if self._clients.leave(client, generation):
                    self._abort_client(client)
            case messages.ClientBack(client, generation):
                if self._clients.enter(client, generation):
                    self._abort_client(client)
                    self._clients.post(client, self._ready())
            case messages.Stop():
                self._stopped = True

    def _add(self, tag: int, request: Request | Exception) -> None:
        """Take a request, or tell its front end why not. Raises EngineDeadError."""
        client = tag >> CLIENT_SHIFT
        if self._clients.gone(client):
            return  # sent before its front end died
        try:
            if isinstance(request, Exception):
                raise request
            self._core.add(request)
        except EngineDeadError:
            raise
        except Exception as e:
            if not isinstance(e, RequestError | QueueFullError):
                _logger.exception("a request could not be taken")
            self._clients.post(client, messages.Refused.from_error(tag, e))

    def _explain(self, client: int) -> None:
        """Tell the plan, or why it cannot be told."""
        try:
            self._clients.post(client, messages.PlanReport(self._core.report()))
        except Exception as e:
            _logger.exception("the plan cannot be told")
            self._clients.post(client, messages.PlanReport({}, messages.as_text(f"{type(e).__name__}: {e}")))

    def _abort_client(self, client: int) -> None:
        for request in self._core.requests:
            if request.tag >> CLIENT_SHIFT == client:
                self._core.abort(request.id)
        self._clients.changed()

    def _ready(self) -> messages.Ready:
        core = self._core
        return messages.Ready(
            core.max_model_len, core.vocab_size, core.eos_token_ids, core.max_num_seqs, core.plan_hash
        )


def freeze_started_objects() -> None:
    """Keep the garbage collector from what an engine or front end has made by its start: that lives on.

    A full collection looks at all of it, for some 20 ms, in which a fast device runs out of steps and streams halt.
    """
    gc.collect()
    gc.freeze()


def start(config: EngineConfig, link: Endpoints) -> multiprocessing.process.BaseProcess:
    """Start the process for all front ends of `link`. Spawned, not forked: devices and threads do not survive a fork.

    It belongs to the caller, with whom it ends.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=main, args=(config, link), name=main_script.ENGINE, daemon=True
    )
    process.start()
    atexit.register(_end, process, os.getpid())
    return process


def _end(engine: multiprocessing.process.BaseProcess, owner: int) -> None:
    """Kill an engine that nobody has closed when its owner's interpreter ends.

    `multiprocessing` would send it SIGTERM, which it leaves to its front end, and wait for it.
    """
    if os.getpid() == owner and engine.is_alive():
        engine.kill()


def exit_words(code: int | None) -> str:
    """An engine process's exit code in words."""
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def stop(engine: multiprocessing.process.BaseProcess, patience: float) -> None:
    """Wait for an engine process to stop; kill it after `patience` seconds."""
    engine.join(patience)
    if engine.is_alive():
        engine.kill()
        engine.join()
