"""Who may use an engine core: one thread at a time, in the order of asking, and without being interrupted."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` costs 15 us a step: it looks handlers up in enumerations
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from hotplug.core.errors import HotplugError

_NAMES = ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_SIGNALS = tuple(getattr(_signal, name) for name in _NAMES if hasattr(_signal, name))
"""Those whose handlers programs let raise, or use the engine: an interrupt, an end, a time-out."""

PATIENCE = 1.0
"""Seconds that a step may take to end before a signal that comes again breaks it off."""


class HeldSignals:
    """Within it, what a signal's Python handler would do to the main thread waits until the end.

    An exception in the middle of a step ends the engine, since it leaves a cache that nobody can trust. A signal that
    comes again after `PATIENCE` does not wait: the step may hang.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._held: dict[int, tuple[float, FrameType | None]] = {}
        """By signal: when it came first, and where."""
        self._thread = threading.get_ident()
        self._over = False

    def __enter__(self) -> None:
        if self._thread != threading.main_thread().ident:
            return  # handlers run in the main thread alone
        try:
            for number in _SIGNALS:
                handler = _signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    _signal.signal(number, self._hold)
        except BaseException:
            self._restore()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handlers:
            self._restore()
            for number, (_, frame) in self._held.items():
                self._handlers[number](number, frame)

    def _restore(self) -> None:
        self._over = True  # should a signal come now, whose handler raises: what is not restored holds nothing any more
        for number, handler in self._handlers.items():
            _signal.signal(number, handler)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        elsewhere = threading.get_ident() != self._thread  # in a fork that another thread has made
        now = time.monotonic()
        first, _ = self._held.setdefault(number, (now, frame))
        if self._over or elsewhere or now - first > PATIENCE:
            self._handlers[number](number, frame)


class Turns:
    """A lock that is given in the order of asking, so that a thread which takes it again at once keeps nobody out."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._owner = 0
        """Identifier of the thread that has it, 0 for none."""
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    def __enter__(self) -> None:
        """Wait for the turn. Raises HotplugError in the thread that has it."""
        me, gate = threading.get_ident(), threading.Lock()
        if self._owner == me:
            raise HotplugError("the engine is used from within its own step", why="by a finalizer or a handler",
                               hint="Use it outside of these.")  # fmt: skip
        with self._mutex:
            if not self._owner:
                self._owner = me
                return
            gate.acquire()
            self._waiting.append((me, gate))
        try:
            gate.acquire()
        except BaseException:  # a signal that did not wait
            self._leave(me, gate)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give()

    def _leave(self, me: int, gate: threading.Lock) -> None:
        """Ask no more, or let the next one have what was given just now."""
        with self._mutex:
            asked = (me, gate) in self._waiting
            if asked:
                self._waiting.remove((me, gate))
        if not asked:
            self.give()

    def take_if_free(self) -> bool:
        """Take the turn if that needs no waiting at all, as in a finalizer, which may run inside of anything."""
        if not self._mutex.acquire(blocking=False):
            return False
        try:
            if self._owner:
                return False
            self._owner = threading.get_ident()
            return True
        finally:
            self._mutex.release()

    def give(self) -> None:
        """Let the next one have it."""
        with self._mutex:
            if self._waiting:
                self._owner, gate = self._waiting.popleft()
                gate.release()
            else:
                self._owner = 0
