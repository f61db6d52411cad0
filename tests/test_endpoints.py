"""Several front ends of one engine: each gets its own tokens, and what happens to one is no matter to the others."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from hotplug import AsyncLLM, SamplingParams
from hotplug.core.config import EngineConfig
from hotplug.core.engine import messages, process
from hotplug.core.engine.endpoints import Endpoints
from hotplug.core.errors import EngineDeadError
from hotplug.core.request import EngineStats, Request

pytestmark = pytest.mark.timeout(120)
ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)


class Stats:
    """An observer that keeps the engine's statistics."""

    def __init__(self) -> None:
        self.last = EngineStats()

    def stats(self, stats: EngineStats) -> None:
        self.last = stats

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


class Shared:
    """An engine, its link, and the front ends attached to it."""

    def __init__(self, config: EngineConfig, link: Endpoints, engine: BaseProcess) -> None:
        self.config, self.link, self.engine = config, link, engine
        self.context = zmq.Context()
        self.inbox = self.context.socket(zmq.PUSH)
        self.inbox.connect(link.inbox)
        self.llms: list[AsyncLLM] = []

    async def attach(self, client: int) -> AsyncLLM:
        llm = AsyncLLM(self.config, Stats(), link=self.link, client=client)  # type: ignore[arg-type]
        self.llms.append(llm)
        await llm.start()
        await asyncio.wait_for(llm.wait_ready(), 60)
        return llm

    def die(self, llm: AsyncLLM) -> None:
        """Leave a front end as a kill does: nobody reads, nobody aborts."""
        self.llms.remove(llm)
        asyncio.get_running_loop().remove_reader(llm._descriptor)
        llm._context.destroy(linger=0)

    def post(self, message: messages.ToEngine) -> None:
        """What a supervisor sends to the engine."""
        self.inbox.send(messages.encode(message))


@asynccontextmanager
async def shared(model: Path, folder: Path, clients: int, **options: Any) -> AsyncIterator[Shared]:
    options = {"max_model_len": 512, "kv_cache_memory": "16MiB", "max_num_seqs": 8, "load_format": "dummy", **options}
    config, link = EngineConfig(model=str(model), **options), Endpoints(str(folder), clients)
    one = Shared(config, link, process.start(config, link))
    try:
        yield one
    finally:
        for llm in one.llms:
            await llm.close()
        one.post(messages.Stop())
        await asyncio.to_thread(one.engine.join, 10)
        one.engine.kill()
        one.context.destroy(linger=0)


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for what the engine is about to say."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        await asyncio.sleep(0.01)


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(main())  # type: ignore[arg-type]


def test_two_front_ends_get_exactly_their_own_tokens(tiny_model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with shared(tiny_model, tmp_path, 2) as one:
            first, second = await asyncio.gather(one.attach(0), one.attach(1))
            params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
            prompts = [[3 + i, 4, 5 + i] for i in range(12)]
            alone = [(await first.generate(prompt, params)).outputs[0].token_ids for prompt in prompts]
            answers = await asyncio.gather(*((first, second)[i % 2].generate(p, params) for i, p in enumerate(prompts)))
            assert [answer.outputs[0].token_ids for answer in answers] == alone
            assert len({tuple(tokens) for tokens in alone}) > 6, "a mix-up would not be seen"
            await first.close()
            assert one.engine.is_alive(), "it is not the front end's to stop"
            assert (await second.generate(prompts[0], params)).outputs[0].token_ids == alone[0]

    run(main)


def test_the_requests_of_a_front_end_that_died_are_aborted_and_its_successor_is_served(
    tiny_model: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        async with shared(tiny_model, tmp_path, 2) as one:
            first, second = await one.attach(0), await one.attach(1)
            stream = second.stream([3, 4], ENDLESS)
            await anext(stream)
            await until(lambda: first.observer.last.running == 1)  # type: ignore[union-attr]
            one.die(second)
            one.post(messages.ClientGone(1))
            await until(lambda: first.observer.last.running == 0)  # type: ignore[union-attr]
            assert first.observer.last.kv_blocks_used == 0  # type: ignore[union-attr]
            third = await one.attach(1)
            output = await third.generate([3, 4], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
            assert len(output.outputs[0].token_ids) == 5

    run(main)


def test_a_front_end_that_never_reads_holds_nobody_up(tiny_model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with shared(tiny_model, tmp_path, 2) as one:
            first = await one.attach(0)
            sampling = SamplingParams(temperature=0.0, max_tokens=500, ignore_eos=True)
            deaf = [
                Request(id=f"deaf-{i}", prompt_token_ids=[3, 4], sampling=sampling, tag=1 << 32 | i) for i in range(4)
            ]
            one.inbox.send_multipart(messages.add_frames(deaf)[0])
            params = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)
            answers = await asyncio.gather(*(first.generate([3, 4, i], params) for i in range(4)))
            assert [len(answer.outputs[0].token_ids) for answer in answers] == [300] * 4
            await until(lambda: first.observer.last.running == 0)  # type: ignore[union-attr]

    run(main)


def test_a_front_end_that_was_dropped_says_so_to_its_streams_and_serves_on(tiny_model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with shared(tiny_model, tmp_path, 1) as one:
            llm = await one.attach(0)
            stream = llm.stream([3, 4], ENDLESS)
            await anext(stream)
            outbox = one.context.socket(zmq.PUSH)
            outbox.connect(one.link.outbox(0))
            outbox.send(messages.encode(messages.Dropped("it does not read")))
            with pytest.raises(EngineDeadError, match="does not read"):
                async for _ in stream:
                    pass
            await until(lambda: llm.observer.last.running == 0)  # type: ignore[union-attr]
            assert llm.ready
            output = await llm.generate([3], SamplingParams(max_tokens=2, ignore_eos=True))
            assert len(output.outputs[0].token_ids) == 2

    run(main)


def test_all_front_ends_learn_of_a_dead_engine_from_its_owner(tiny_model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with shared(tiny_model, tmp_path, 2) as one:
            llms = [await one.attach(0), await one.attach(1)]
            streams = [llm.stream([3, 4], ENDLESS) for llm in llms]
            for stream in streams:
                await anext(stream)
            assert one.engine.pid is not None
            os.kill(one.engine.pid, signal.SIGKILL)
            await asyncio.to_thread(one.engine.join, 10)
            for client in range(2):
                outbox = one.context.socket(zmq.PUSH)
                outbox.connect(one.link.outbox(client))
                outbox.send(messages.encode(messages.Failed("killed by SIGKILL", "", True)))
            for llm, stream in zip(llms, streams, strict=True):
                with pytest.raises(EngineDeadError, match="SIGKILL"):
                    async for _ in stream:
                        pass
                assert not llm.ready and await llm.wait_dead() == "killed by SIGKILL"

    run(main)


def test_an_engine_that_cannot_start_tells_all_front_ends_why(tiny_model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "tokenizer.json").write_text((tiny_model / "tokenizer.json").read_text())
        (folder / "config.json").write_text('{"architectures": ["NoSuchForCausalLM"]}')
        async with shared(folder, tmp_path, 2) as one:
            for client in range(2):
                with pytest.raises(EngineDeadError, match="NoSuchForCausalLM"):
                    await one.attach(client)

    run(main)


def test_a_flood_of_aborts_leaves_nothing_behind(tiny_model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with shared(tiny_model, tmp_path, 1) as one:
            llm = await one.attach(0)

            async def give_up(number: int) -> None:
                stream = llm.stream([3, 4, number % 9], ENDLESS)
                if number % 3:
                    await anext(stream)
                else:
                    reader = asyncio.ensure_future(anext(stream))
                    await asyncio.sleep(0)
                    reader.cancel()
                    await asyncio.gather(reader, return_exceptions=True)
                await stream.aclose()

            await asyncio.wait_for(asyncio.gather(*(give_up(number) for number in range(300))), 60)
            began = time.monotonic()
            await until(lambda: llm.observer.last.running == llm.observer.last.waiting == 0)  # type: ignore[union-attr]
            assert time.monotonic() - began < 2
            assert llm.observer.last.kv_blocks_used == 0  # type: ignore[union-attr]
            output = await llm.generate([3], SamplingParams(max_tokens=2, ignore_eos=True))
            assert len(output.outputs[0].token_ids) == 2

    run(main)


def test_an_engine_without_work_uses_no_processor(tiny_model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with shared(tiny_model, tmp_path, 2) as one:
            llm = await one.attach(0)  # the other never comes
            await llm.generate([3], SamplingParams(max_tokens=2, ignore_eos=True))
            engine = psutil.Process(one.engine.pid)
            await asyncio.sleep(0.5)
            before, begin = sum(engine.cpu_times()[:2]), time.monotonic()
            await asyncio.sleep(3)
            assert (sum(engine.cpu_times()[:2]) - before) / (time.monotonic() - begin) <= 0.01

    run(main)
