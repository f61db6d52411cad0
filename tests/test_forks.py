"""Forks of a process that has run an engine: its own use of it is refused at once, and nothing else of it hangs."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from hotplug import LLM, AsyncLLM, SamplingParams
from hotplug.core.client import forks
from hotplug.core.client.turns import HeldSignals
from hotplug.core.config import EngineConfig
from hotplug.core.errors import EngineDeadError

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks"),
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]
OPTIONS: dict[str, Any] = {"load_format": "dummy", "max_model_len": 256, "kv_cache_memory": "8MiB"}
PARAMS = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
LIMIT = 60
"""Seconds until a child that hangs is killed."""


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of enough columns that PyTorch computes it with all of its threads."""
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 256, "intermediate_size": 512, "torch_dtype": request.param}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), **OPTIONS)


@pytest.fixture(autouse=True)
def used(llm: LLM) -> list[int]:
    """The engine has just run in this thread, so that PyTorch keeps threads for it; its tokens."""
    compute()
    return tokens(llm)


def tokens(llm: LLM) -> list[int]:
    return llm.generate("hello " * 20, PARAMS, progress=False)[0].outputs[0].token_ids


def compute() -> float:
    """What needs PyTorch's threads."""
    return float((torch.ones(400, 400) @ torch.ones(400, 400)).sum() + torch.ones(1 << 20).exp().sum())


def in_fork(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked child, as JSON can tell it; its error as text."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LIMIT)
            os.write(send, json.dumps(work()).encode())
        except BaseException:
            os.write(send, json.dumps(traceback.format_exc()).encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"the child was ended by signal {-status}"
    return json.loads(said)


def refusal(use: Callable[[], Any]) -> str:
    try:
        use()
    except EngineDeadError as e:
        return str(e)
    return "not refused"


def test_a_fork_is_told_that_the_engine_is_not_its_own(llm: LLM, used: list[int]) -> None:
    stream = llm.stream("hello", PARAMS)
    next(stream)

    def child() -> list[str]:
        uses = [
            lambda: llm.generate("a"), lambda: llm.chat([{"role": "user", "content": "a"}]), lambda: llm.stream("a"),
            lambda: llm.chat_stream([{"role": "user", "content": "a"}]), lambda: next(stream),
        ]  # fmt: skip
        found = [refusal(use) for use in uses]
        stream.close()
        llm.close()
        return found

    for message in in_fork(child):
        assert f"process {os.getpid()} made it" in message
        assert 'start such processes with multiprocessing.get_context("spawn")' in message
    assert len(list(stream)) == 3  # the child has ended nothing
    assert tokens(llm) == used


def test_a_fork_computes_with_pytorch(llm: LLM) -> None:
    assert in_fork(compute) == compute()


def test_a_fork_makes_an_engine_of_its_own(llm: LLM, folder: Path, used: list[int]) -> None:
    assert in_fork(lambda: tokens(LLM(str(folder), **OPTIONS))) == used
    assert tokens(llm) == used


def test_a_fork_while_another_thread_generates(llm: LLM, used: list[int]) -> None:
    begun, stop = threading.Event(), threading.Event()

    def generate() -> None:
        while not stop.is_set():
            tokens(llm)
            begun.set()

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        assert begun.wait(30)
        for _ in range(5):
            message, computed = in_fork(lambda: [refusal(lambda: llm.generate("a")), compute()])
            assert "belongs to another process" in message
            assert computed == compute()
    finally:
        stop.set()
        thread.join()
    assert tokens(llm) == used


def test_a_fork_while_the_main_thread_holds_signals_is_interrupted(llm: LLM) -> None:
    def interrupted() -> bool:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            return True
        return False

    with HeldSignals(), ThreadPoolExecutor(1) as threads:  # as in a step
        assert threads.submit(in_fork, interrupted).result(LIMIT)


def test_a_forked_worker_of_multiprocessing_is_told(llm: LLM) -> None:
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    worker = context.Process(target=lambda: send.send((refusal(lambda: llm.generate("a")), compute())))
    worker.start()
    assert receive.poll(LIMIT)
    message, computed = receive.recv()
    worker.join(LIMIT)
    assert worker.exitcode == 0
    assert "belongs to another process" in message
    assert computed == compute()


class Computed(torch.utils.data.Dataset[float]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        if index >= len(self):
            raise IndexError
        return compute()


def test_a_data_loaders_workers_compute(llm: LLM, used: list[int]) -> None:
    loader = torch.utils.data.DataLoader(
        Computed(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=LIMIT
    )
    assert list(loader) == [compute()] * 4
    assert tokens(llm) == used


def test_a_fork_never_destroys_its_parents_engines() -> None:
    """Libraries wait for their threads in destructors."""
    destroyed = []

    class Engine:
        def __del__(self) -> None:
            destroyed.append(True)

    engines = [Engine()]
    forks.engine_made(engines[0], accelerator=False)

    def end() -> int:
        engines.clear()
        return len(destroyed)

    assert in_fork(end) == 0
    assert end() == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"exec": "compile"}, {"tensor_parallel_size": 2}], ids=["compiled", "ranks"])
def test_a_forked_program_ends(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    if "exec" in options:
        pytest.importorskip("openvino")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\nfrom hotplug import LLM\n"
        f"llm = LLM({str(folder)!r}, device='cpu', **{OPTIONS | options})\n"
        "llm.generate('hello', progress=False)\n"
        "if not os.fork():\n    signal.alarm(30)\n    sys.exit(0)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=100)


def test_no_engine_is_made_in_the_fork_of_an_accelerators_process(
    llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "_accelerator_used", False)
    forks.engine_made(llm.core, accelerator=True)
    message = in_fork(lambda: refusal(lambda: LLM(str(folder), **OPTIONS)))
    assert message.startswith(
        "no engine can be made in this process: it was forked from one that has used an accelerator"
    )
    assert 'get_context("spawn")' in message


def test_no_engine_is_made_where_it_would_wait_for_threads_of_its_parent(
    llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "_give_up_openmp_threads", lambda: False)
    message = in_fork(lambda: refusal(lambda: LLM(str(folder), **OPTIONS)))
    assert "forked from one whose OpenMP threads a fork would wait for" in message


def test_a_fork_of_an_async_front_end_is_told_and_harms_nobody(folder: Path) -> None:
    async def main() -> None:
        front = AsyncLLM(EngineConfig.from_mapping({"model": str(folder), **OPTIONS}, where="test"))
        await front.start()
        try:
            await front.wait_ready()

            async def uses() -> list[str]:
                found = []
                for use in (front.generate("a"), front.wait_ready(), front.start(), front.explain(), front.close()):
                    try:
                        await use
                        found.append("not refused")
                    except EngineDeadError as e:
                        found.append(str(e))
                return found

            def child() -> list[str]:
                multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # what a program's end does
                return asyncio.run(uses())

            *messages, closed = in_fork(child)
            assert all("belongs to another process" in message for message in messages), messages
            assert closed == "not refused"
            output = await front.generate([3, 4, 5], PARAMS)
            assert len(output.outputs[0].token_ids) == 4
        finally:
            await front.close()

    asyncio.run(main())
