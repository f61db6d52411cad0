"""The chunks of a submission: they end once, whoever ends them, and what is dropped unread is given up."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

import pytest

from hotplug.core.client.chunks import Chunks
from hotplug.core.client.mailbox import Mailbox
from hotplug.core.client.outputs import CompletionChunk
from hotplug.core.errors import EngineDeadError


def run(test: Callable[[Mailbox, list[str]], object], running: int = 2) -> list[str]:
    """What `test` leaves of (a mailbox, the calls of close), on an event loop of its own."""
    closed: list[str] = []

    async def main() -> None:
        await test(Mailbox(), closed)  # type: ignore[misc]
        await asyncio.sleep(0)

    asyncio.run(main())
    return closed


def made(mailbox: Mailbox, closed: list[str], running: int = 2) -> Chunks:
    return Chunks(mailbox, running, lambda: closed.append("closed"))


def chunk(index: int, *, ends: bool = False) -> CompletionChunk:
    return CompletionChunk(index, "a", [1], finish_reason="length" if ends else None)


def test_they_end_with_the_last_completion() -> None:
    async def test(mailbox: Mailbox, closed: list[str]) -> None:
        chunks = made(mailbox, closed)
        for one in (chunk(0, ends=True), chunk(1)):
            mailbox.put(one)
        assert [await anext(chunks), await anext(chunks)] == [chunk(0, ends=True), chunk(1)]
        assert not closed
        mailbox.put(chunk(1, ends=True))
        assert [one.finish_reason async for one in chunks] == ["length"]
        assert closed == ["closed"]
        await chunks.aclose()

    assert run(test) == ["closed"]


def test_closed_ones_have_no_more() -> None:
    async def test(mailbox: Mailbox, closed: list[str]) -> None:
        chunks = made(mailbox, closed)
        mailbox.put(chunk(0))
        await chunks.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)

    assert run(test) == ["closed"]


def test_ones_that_nobody_reads_are_given_up() -> None:
    async def test(mailbox: Mailbox, closed: list[str]) -> None:
        made(mailbox, closed)
        gc.collect()

    assert run(test) == ["closed"]


def test_ones_dropped_in_another_thread_are_closed_on_their_loop() -> None:
    async def test(mailbox: Mailbox, closed: list[str]) -> None:
        held = [Chunks(mailbox, 1, lambda: closed.append(str(asyncio.get_running_loop() is loop)))]
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(held.clear)

    assert run(test) == ["True"]


@pytest.mark.parametrize("error", [EngineDeadError("gone"), asyncio.CancelledError()], ids=["failed", "cancelled"])
def test_an_error_of_the_wait_ends_them(error: BaseException) -> None:
    async def test(mailbox: Mailbox, closed: list[str]) -> None:
        chunks = made(mailbox, closed)
        waiting = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0)
        waiting.cancel() if isinstance(error, asyncio.CancelledError) else mailbox.fail(error)  # type: ignore[arg-type]
        with pytest.raises(type(error)):
            await waiting
        assert closed == ["closed"]

    run(test)


def test_whoever_waits_is_the_only_reader_and_is_not_forgotten() -> None:
    async def test(mailbox: Mailbox, closed: list[str]) -> None:
        chunks = made(mailbox, closed)
        waiting = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0)
        for other in (anext(chunks), chunks.aclose(), chunks.athrow(KeyError())):
            with pytest.raises(RuntimeError, match="waits"):
                await other
        mailbox.put(chunk(0))
        assert await waiting == chunk(0)
        await chunks.aclose()

    assert run(test) == ["closed"]


def test_what_is_thrown_in_ends_them_and_comes_back() -> None:
    async def test(mailbox: Mailbox, closed: list[str]) -> None:
        with pytest.raises(KeyError):
            await made(mailbox, closed).athrow(KeyError("x"))

    assert run(test) == ["closed"]
