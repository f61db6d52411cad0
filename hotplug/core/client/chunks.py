"""The chunks of one submission, as whoever asked for it reads them.

A submission is with the engine before anybody reads: its first step runs while the reader gets ready. It ends with its
last chunk, when the reader closes it, and when nobody holds it any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import TracebackType

from hotplug.core.client.mailbox import Mailbox
from hotplug.core.client.outputs import CompletionChunk


class Chunks(AsyncGenerator[CompletionChunk, None]):
    """Chunks of `running` completions as they come to a mailbox; for one reader, made on its event loop."""

    def __init__(self, mailbox: Mailbox, running: int, close: Callable[[], None]) -> None:
        """`close` is called once, on the event loop."""
        self._mailbox = mailbox
        self._running = running
        self._close: Callable[[], None] | None = close
        self._reading = False
        self._loop = asyncio.get_running_loop()

    async def __anext__(self) -> CompletionChunk:
        """The next chunk. Raises what the mailbox was failed with, and RuntimeError for a second reader meanwhile."""
        if self._close is None:
            raise StopAsyncIteration
        self._require_unread()
        self._reading = True
        try:
            chunk = await self._mailbox.get()
        except BaseException:
            self._end()
            raise
        finally:
            self._reading = False
        if chunk.finish_reason is not None:
            self._running -= 1
            if not self._running:
                self._end()
        return chunk

    async def asend(self, value: None) -> CompletionChunk:
        return await self.__anext__()

    async def athrow(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> CompletionChunk:
        """End, and raise the exception."""
        self._require_unread()
        self._end()
        if isinstance(typ, BaseException):
            raise typ
        raise val if isinstance(val, BaseException) else typ()

    async def aclose(self) -> None:
        """End; what has not ended is aborted. Raises RuntimeError while somebody waits for a chunk: cancel that."""
        self._require_unread()
        self._end()

    def _require_unread(self) -> None:
        """As of a generator, whose frame is one reader's."""
        if self._reading:
            raise RuntimeError("somebody waits for these chunks already")

    def _end(self) -> None:
        close, self._close = self._close, None
        if close is not None:
            close()

    def __del__(self) -> None:
        close = getattr(self, "_close", None)
        if close is not None and not self._loop.is_closed():  # the collector may run in another thread
            self._loop.call_soon_threadsafe(close)
