"""AsyncLLM over a real engine process: streams, aborts, refusals, and the death of the engine."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hotplug import AsyncLLM, SamplingParams
from hotplug.core.config import EngineConfig
from hotplug.core.errors import EngineDeadError, NotReadyError, PromptTooLongError, QueueFullError
from hotplug.core.request import EngineStats

pytestmark = pytest.mark.timeout(120)
ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple] = []
        self.last = EngineStats()
        self.changed = asyncio.Event()

    def first_token(self, seconds):
        self.events.append(("first_token", seconds))

    def inter_token(self, seconds, tokens):
        self.events.append(("inter_token", seconds, tokens))

    def inter_tokens(self, seconds):
        for one in seconds:
            self.inter_token(one, 1)

    def queued(self, seconds):
        self.events.append(("queued", seconds))

    def finished(self, reason, prompt_tokens, output_tokens, seconds):
        self.events.append(("finished", reason, prompt_tokens, output_tokens))

    def stats(self, stats):
        self.last = stats
        self.changed.set()

    async def until(self, condition) -> None:
        while not condition(self.last):
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 30)


@asynccontextmanager
async def serving(tiny_model, **options):
    options = {"max_model_len": 512, "kv_cache_memory": "16MiB", "max_num_seqs": 4, "load_format": "dummy", **options}
    llm = AsyncLLM(EngineConfig(model=str(tiny_model), **options), Recorder())
    await llm.start()
    try:
        await llm.wait_ready()
        yield llm
    finally:
        await llm.close()


def run(coroutine):
    return asyncio.run(coroutine)


def test_streamed_chunks_join_to_the_whole_output_and_are_observed(tiny_model):
    async def main():
        async with serving(tiny_model) as llm:
            params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
            chunks = [chunk async for chunk in llm.stream([3, 4, 5], params)]
            whole = await llm.generate([3, 4, 5], params)
            assert [t for chunk in chunks for t in chunk.token_ids] == whole.outputs[0].token_ids
            assert "".join(chunk.text for chunk in chunks) == whole.outputs[0].text
            assert chunks[-1].finish_reason == "length"
            kinds = [event[0] for event in llm.observer.events]
            assert kinds[:2] == ["queued", "first_token"]
            assert kinds.count("inter_token") == 16
            assert ("finished", "length", 3, 9) in llm.observer.events

    run(main())


def test_what_comes_while_nobody_reads_is_one_chunk(tiny_model):
    async def main():
        async with serving(tiny_model) as llm:
            params = SamplingParams(n=2, temperature=0.0, max_tokens=50, ignore_eos=True)
            whole = await llm.generate([3, 4, 5], params)
            llm.observer.events.clear()
            stream = llm.stream([3, 4, 5], params)
            chunks = [await anext(stream)]
            await llm.observer.until(lambda _: sum(e[0] == "finished" for e in llm.observer.events) == 2)
            chunks += [chunk async for chunk in stream]
            assert len(chunks) <= 3
            for output in whole.outputs:
                own = [chunk for chunk in chunks if chunk.index == output.index]
                assert [t for chunk in own for t in chunk.token_ids] == output.token_ids
                assert ("".join(chunk.text for chunk in own), own[-1].finish_reason) == (output.text, "length")

    run(main())


def test_several_completions_of_one_prompt_share_a_stream(tiny_model):
    async def main():
        async with serving(tiny_model) as llm:
            params = SamplingParams(n=3, seed=1, max_tokens=5, ignore_eos=True)
            output = await llm.generate([3, 4, 5], params)
            assert [len(c.token_ids) for c in output.outputs] == [5, 5, 5]
            assert len({tuple(c.token_ids) for c in output.outputs}) > 1

    run(main())


def test_closing_a_stream_aborts_the_request_and_frees_its_blocks(tiny_model):
    async def main():
        async with serving(tiny_model) as llm:
            stream = llm.stream([3, 4, 5], ENDLESS)
            await anext(stream)
            await stream.aclose()
            await llm.observer.until(lambda s: s.running == 0 and s.kv_blocks_used == 0)
            assert llm.observer.last.generated_tokens < 500

    run(main())


def test_a_prompt_over_the_context_is_refused_and_the_engine_goes_on(tiny_model):
    async def main():
        async with serving(tiny_model) as llm:
            with pytest.raises(PromptTooLongError):
                await llm.generate([3] * 600)
            output = await llm.generate([3], SamplingParams(max_tokens=1))
            assert len(output.outputs[0].token_ids) == 1

    run(main())


def test_a_full_queue_refuses_with_advice_when_to_retry(tiny_model):
    async def main():
        async with serving(tiny_model, max_queue=2) as llm:
            answers = await asyncio.gather(
                *(llm.generate([3, 4], SamplingParams(max_tokens=20, ignore_eos=True)) for _ in range(40)),
                return_exceptions=True,
            )
            refused = [a for a in answers if isinstance(a, QueueFullError)]
            assert refused
            assert all(error.retry_after >= 1 for error in refused)
            served = [a for a in answers if not isinstance(a, Exception)]
            assert len(served) + len(refused) == 40
            assert len(served) >= 6

    run(main())


def test_before_it_is_ready_requests_are_told_so(tiny_model):
    async def main():
        llm = AsyncLLM(EngineConfig(model=str(tiny_model), load_format="dummy"))
        with pytest.raises(NotReadyError):
            await llm.generate([3])
        await llm.close()

    run(main())


def test_a_killed_engine_ends_requests_with_its_exit_reason(tiny_model):
    async def main():
        async with serving(tiny_model) as llm:
            stream = llm.stream([3, 4], ENDLESS)
            await anext(stream)
            os.kill(llm.engine_pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="SIGKILL"):
                async for _ in stream:
                    pass
            assert not llm.ready
            with pytest.raises(EngineDeadError, match="SIGKILL"):
                await llm.generate([3])

    run(main())


def test_an_engine_that_cannot_start_says_why(tiny_model, tmp_path):
    async def main():
        (tmp_path / "tokenizer.json").write_text((tiny_model / "tokenizer.json").read_text())
        (tmp_path / "config.json").write_text('{"architectures": ["NoSuchForCausalLM"]}')
        llm = AsyncLLM(EngineConfig(model=str(tmp_path), load_format="dummy"))
        await llm.start()
        with pytest.raises(EngineDeadError, match="NoSuchForCausalLM"):
            await asyncio.wait_for(llm.wait_ready(), 60)
        await llm.close()

    run(main())


PARENT = """
import asyncio
from hotplug import AsyncLLM
from hotplug.core.config import EngineConfig

async def main():
    llm = AsyncLLM(EngineConfig(model={model!r}, load_format="dummy", kv_cache_memory="4MiB"))
    await llm.start()
    await llm.wait_ready()
    print(llm.engine_pid, flush=True)
    {then}

if __name__ == "__main__":
    asyncio.run(main())
"""


def _parent(model: Path, folder: Path, then: str) -> subprocess.Popen[str]:
    """A process that owns an engine, prints its pid when that is ready, and goes on with the statement `then`."""
    script = folder / "parent.py"
    script.write_text(PARENT.format(model=str(model), then=then))
    return subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_the_engine_process_ends_when_its_parent_is_killed(tiny_model, tmp_path):
    with _parent(tiny_model, tmp_path, "await asyncio.sleep(60)") as parent:
        engine = int(parent.stdout.readline())
        parent.kill()
    assert _gone(engine, 10.0)


def test_an_error_in_the_owner_ends_its_process_and_the_engine(tiny_model, tmp_path):
    with _parent(tiny_model, tmp_path, "raise ValueError") as parent:
        engine = int(parent.stdout.readline())
        assert parent.wait(20) == 1
    assert _gone(engine, 10.0)


def _gone(pid: int, seconds: float) -> bool:
    """Whether the process ends within `seconds`."""
    import psutil

    try:
        psutil.Process(pid).wait(seconds)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True
