"""The thread in which an engine's KV connector works, so that the engine's loop never waits for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol


class Background(Protocol):
    """What runs a connector's calls: `concurrent.futures.ThreadPoolExecutor` with one thread, in an engine."""

    def submit(self, call: Callable[..., Any], /, *args: Any) -> Future[Any]: ...


class Immediate:
    """Runs each call at once, where it is submitted: for tests, and wherever order matters more than time."""

    def submit(self, call: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """A future that is done. An error of the call is the future's."""
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args))
        except BaseException as e:
            future.set_exception(e)
        return future
