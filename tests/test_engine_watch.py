"""A front end and an engine that does not answer: what is let in is bounded, nobody waits forever, and it is known."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from hotplug import AsyncLLM, SamplingParams
from hotplug.core.client import async_llm, watch
from hotplug.core.client.watch import Watch
from hotplug.core.config import EngineConfig
from hotplug.core.engine import messages
from hotplug.core.engine.endpoints import Endpoints
from hotplug.core.errors import EngineDeadError, HotplugError, NotReadyError, QueueFullError, RequestError

pytestmark = pytest.mark.timeout(120)

SHORT = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


class Clock:
    """What `time.monotonic` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: self.now))


# --- the bookkeeping ---


def test_silence_counts_from_the_first_thing_sent_and_ends_with_any_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, one = Clock(monkeypatch), Watch(4, 1)
    clock.now += 50
    assert one.silence == 0.0, "an engine that owes nothing may be silent"
    one.sent()
    clock.now += 3
    one.sent()
    assert one.silence == 3.0
    one.heard(clock.now, owes=True)
    assert one.silence == 0.0
    clock.now += 2
    assert one.silence == 2.0
    one.heard(clock.now, owes=False)
    clock.now += 99
    assert one.silence == 0.0


def test_as_many_are_let_in_as_the_engine_runs_and_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, one = Clock(monkeypatch), Watch(6, 2)
    one.max_num_seqs = 4
    one.check_room(0, 10)
    one.check_room(7, 3)
    with pytest.raises(QueueFullError, match="8 requests are in flight") as full:
        one.check_room(8, 3)
    assert full.value.retry_after == 3
    with pytest.raises(RequestError, match=r"n is 11.*at most 10") as many:
        one.check_room(0, 11)
    assert many.value.param == "n"
    one.sent()
    clock.now += watch.SLOW
    one.check_room(4, 1)
    with pytest.raises(QueueFullError, match="has not answered for 1 s"):  # its share is half
        one.check_room(5, 1)
    one.heard(clock.now, owes=True)
    one.check_room(9, 1)


def test_what_was_sent_to_a_silent_engine_counts_though_nobody_waits_for_it_any_more() -> None:
    one = Watch(6, 1)
    one.max_num_seqs = 4
    for _ in range(10):
        one.check_room(0, 1)
        one.sent(1)
    with pytest.raises(QueueFullError, match="10 requests are in flight"):
        one.check_room(0, 1)
    one.heard(0.0, owes=False)
    one.check_room(0, 1)


# --- a real engine ---


@asynccontextmanager
async def serving(model: Path, **options: Any) -> AsyncIterator[AsyncLLM]:
    options = {"max_model_len": 512, "kv_cache_memory": "16MiB", "max_num_seqs": 4, "max_queue": 2,
               "load_format": "dummy", **options}  # fmt: skip
    llm = AsyncLLM(EngineConfig(model=str(model), **options))
    await llm.start()
    try:
        await asyncio.wait_for(llm.wait_ready(), 60)
        yield llm
    finally:
        signal_engine(llm, signal.SIGCONT)
        await llm.close()


def signal_engine(llm: AsyncLLM, number: signal.Signals) -> None:
    assert llm.engine_pid is not None
    if llm.failure is None:
        os.kill(llm.engine_pid, number)


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        await asyncio.sleep(0.01)


def test_a_stopped_engine_is_sent_no_more_than_it_may_queue_and_serves_that_when_it_goes_on(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_llm, "SILENT", 0.3)

    async def main() -> None:
        async with serving(tiny_model) as llm:
            alone = (await llm.generate([3, 4], SHORT)).outputs[0].token_ids
            signal_engine(llm, signal.SIGSTOP)
            asked = [asyncio.ensure_future(llm.generate([3, 4], SHORT)) for _ in range(30)]
            several = asyncio.ensure_future(llm.generate([3, 4], SamplingParams(n=3, max_tokens=2)))
            done, waiting = await asyncio.wait([*asked, several], timeout=0.2)
            assert [type(one.exception()) for one in done] == [QueueFullError] * 25
            assert len(waiting) == 4 + 2 and several in done
            with pytest.raises(QueueFullError):
                llm.stream([3, 4], SHORT)
            await until(lambda: llm.stalled is not None)
            assert "6 requests in flight" in str(llm.stalled)
            with pytest.raises(NotReadyError, match="has not answered"):
                await llm.explain()
            signal_engine(llm, signal.SIGCONT)
            answers = await asyncio.wait_for(asyncio.gather(*waiting), 20)
            assert [answer.outputs[0].token_ids for answer in answers] == [alone] * 6
            await until(lambda: llm.stalled is None)
            assert (await llm.explain())["plan_hash"] == llm.plan_hash

    asyncio.run(main())


def test_an_engine_that_is_stopped_is_known_though_its_clients_have_given_up(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_llm, "SILENT", 0.3)

    async def main() -> None:
        async with serving(tiny_model) as llm:
            await llm.generate([3], SHORT)
            assert llm.stalled is None
            signal_engine(llm, signal.SIGSTOP)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(llm.generate([3], SHORT), 0.1)
            await until(lambda: llm.stalled is not None)
            signal_engine(llm, signal.SIGCONT)
            await until(lambda: llm.stalled is None)
            await asyncio.sleep(0.5)
            assert llm.stalled is None, "it owes nothing"

    asyncio.run(main())


class Ends:
    """A link with the test at the engine's end."""

    def __init__(self, model: Path, folder: Path, **options: Any) -> None:
        link = Endpoints(str(folder), 1)
        self.context = zmq.Context()
        self.inbox = self.context.socket(zmq.PULL)
        self.inbox.bind(link.inbox)
        self.outbox = self.context.socket(zmq.PUSH)
        self.outbox.connect(link.outbox(0))
        self.llm = AsyncLLM(EngineConfig(model=str(model), **options), link=link)

    def say(self, message: messages.FromEngine | bytes) -> None:
        self.outbox.send(message if isinstance(message, bytes) else messages.encode(message))

    async def asked(self) -> messages.ToEngine:
        await until(lambda: self.inbox.poll(0))
        return messages.decode_to_engine(self.inbox.recv_multipart(copy=False))

    async def __aenter__(self) -> Ends:
        await self.llm.start()
        assert isinstance(await self.asked(), messages.ClientBack)
        self.say(messages.Ready(512, 258, (1,), 4, "abc"))
        await asyncio.wait_for(self.llm.wait_ready(), 60)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.llm.close()
        self.context.destroy(linger=0)


def test_the_plan_is_asked_once_for_all_who_wait_and_again_when_the_answer_was_lost(
    tiny_model: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        async with Ends(tiny_model, tmp_path) as ends:
            asked = [asyncio.ensure_future(ends.llm.explain()) for _ in range(3)]
            assert await ends.asked() == messages.Explain(0)
            asked[1].cancel()
            ends.say(messages.Dropped("it does not read"))
            assert await ends.asked() == messages.Explain(0)
            ends.say(b"\xff")
            assert await ends.asked() == messages.Explain(0)
            ends.say(messages.PlanReport({"a": 1}))
            assert [await one for one in asked[::2]] == [{"a": 1}] * 2
            assert not ends.inbox.poll(50)
            failing = asyncio.ensure_future(ends.llm.explain())
            await ends.asked()
            ends.say(messages.PlanReport({}, "TypeError: no such thing"))
            with pytest.raises(HotplugError, match="the plan cannot be told: TypeError"):
                await failing
            dying = asyncio.ensure_future(ends.llm.explain())
            await ends.asked()
            ends.say(messages.Failed("it died", "", True))
            with pytest.raises(EngineDeadError, match="it died"):
                await dying

    asyncio.run(main())


def test_a_message_that_cannot_be_read_ends_what_was_in_flight_and_nothing_later(
    tiny_model: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        async with Ends(tiny_model, tmp_path) as ends:
            lost = asyncio.ensure_future(ends.llm.generate([3, 4], SHORT))
            assert isinstance(await ends.asked(), messages.Add)
            ends.say(b"nonsense")
            with pytest.raises(EngineDeadError, match="could not be read"):
                await lost
            assert isinstance(await ends.asked(), messages.Abort)
            later = asyncio.ensure_future(ends.llm.generate([3, 4], SHORT))
            add = await ends.asked()
            assert isinstance(add, messages.Add) and ends.llm.ready
            ends.say(messages.Refused(add.tags[0], "failed", "KeyError: 'x'"))
            with pytest.raises(HotplugError, match="could not take the request: KeyError"):
                await later

    asyncio.run(main())
