"""The engine process: builds an EngineCore, then serves messages and steps until told to stop.

It blocks while there is nothing to do. It ends by itself when its parent dies, and never without a last
message that says why.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import traceback

import zmq

from hotplug.core.config import EngineConfig
from hotplug.core.engine import messages
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import HotplugError, QueueFullError, RequestError

EXIT_FAILED = 1


def main(config: EngineConfig, inbox: str, outbox: str) -> None:
    """Entry of the process. `inbox` and `outbox` are ZeroMQ addresses that the front end is bound to."""
    # A signal to the whole process group is the front end's to handle: it lets running requests finish first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    context = zmq.Context()
    receive, send = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    receive.connect(inbox)
    send.connect(outbox)
    try:
        EngineProcess(config, receive, send).run()
    except Exception as e:
        send.send(messages.encode(messages.Failed(str(e), traceback.format_exc(), isinstance(e, HotplugError))))
        raise SystemExit(EXIT_FAILED) from e
    finally:
        context.destroy(linger=2000)


class EngineProcess:
    """The loop around one EngineCore."""

    def __init__(self, config: EngineConfig, receive: zmq.Socket[bytes], send: zmq.Socket[bytes]) -> None:
        self._receive = receive
        self._send = send
        self._poller = zmq.Poller()
        self._poller.register(receive, zmq.POLLIN)
        parent = multiprocessing.parent_process()
        self._parent = parent.sentinel if parent is not None else None
        if self._parent is not None:
            self._poller.register(self._parent, zmq.POLLIN)
        self._core = EngineCore(config)
        self._ranks = self._core.sentinels
        for sentinel in self._ranks:
            self._poller.register(sentinel, zmq.POLLIN)
        freeze_started_objects()
        self._stopped = False

    def run(self) -> None:
        """Serve until stopped, or until the parent is gone."""
        core = self._core
        self._post(messages.Ready(core.max_model_len, core.vocab_size, core.eos_token_ids))
        while not self._stopped:
            self._read(block=not core.has_work)
            if core.has_work:
                self._post(messages.Outputs(core.step(), core.stats()))

    def _read(self, *, block: bool) -> None:
        """Handle every message that is there; with `block`, wait for the first."""
        while not self._stopped:
            ready = dict(self._poller.poll(None if block else 0))
            if self._parent in ready:
                self._stopped = True
            if self._ranks and not ready.keys().isdisjoint(self._ranks):
                self._core.check_ranks()
            if self._receive not in ready:
                return
            self._handle(messages.decode_to_engine(self._receive.recv()))
            block = False

    def _handle(self, message: messages.ToEngine) -> None:
        match message:
            case messages.Add(requests):
                for request in requests:
                    try:
                        self._core.add(request)
                    except (RequestError, QueueFullError) as e:
                        self._post(messages.Refused.from_error(request.id, e))
            case messages.Abort(request_ids):
                for request_id in request_ids:
                    self._core.abort(request_id)
                self._post(messages.Outputs([], self._core.stats()))
            case messages.Explain():
                self._post(messages.Plan(self._core.report()))
            case messages.Stop():
                self._stopped = True

    def _post(self, message: messages.FromEngine) -> None:
        self._send.send(messages.encode(message))


def freeze_started_objects() -> None:
    """Keep the garbage collector from what an engine's start has made, which lives as long as the process.

    A full collection looks at all of it, for some 20 ms, in which a fast device runs out of steps.
    """
    gc.collect()
    gc.freeze()


def start(config: EngineConfig, inbox: str, outbox: str) -> multiprocessing.process.BaseProcess:
    """Start the process. Spawned, not forked: devices and threads do not survive a fork."""
    process = multiprocessing.get_context("spawn").Process(
        target=main, args=(config, inbox, outbox), name="hotplug-engine", daemon=True
    )
    process.start()
    return process
