"""Where the consumer of one submission waits for its chunks.

A consumer that does not keep up finds what came in between merged into one chunk a completion, so that memory is
bounded by the output and an overloaded server sends fewer, larger events.
"""

from __future__ import annotations

import asyncio

from hotplug.core.client.outputs import CompletionChunk
from hotplug.core.errors import HotplugError


class Mailbox:
    """Holds at most one chunk of each completion. For one consumer."""

    __slots__ = ("_error", "_pending", "_waiter")

    def __init__(self) -> None:
        self._pending: dict[int, CompletionChunk] = {}
        """By index of the completion, in the order of their first tokens."""
        self._error: HotplugError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        """Chunks that wait."""
        return len(self._pending)

    def put(self, chunk: CompletionChunk) -> None:
        pending = self._pending.get(chunk.index)
        if pending is None:
            self._pending[chunk.index] = chunk
            self._wake()
        else:
            pending.extend(chunk)

    def put_token(self, index: int, text: str, token: int) -> None:
        """`put` of a chunk that is one token and nothing else. Hot path."""
        pending = self._pending.get(index)
        if pending is None:
            self._pending[index] = CompletionChunk(index, text, [token])
            if self._waiter is not None:
                self._wake()
        else:
            pending.text += text
            pending.token_ids.append(token)

    def fail(self, error: HotplugError) -> None:
        """Nothing more will come; what is here is still taken, then `error` is raised."""
        self._error = error
        self._wake()

    async def get(self) -> CompletionChunk:
        """The next chunk. Raises what `fail` was given."""
        pending = self._pending
        while not pending:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return pending.pop(next(iter(pending)))

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():  # cancelled with its consumer
            waiter.set_result(None)
