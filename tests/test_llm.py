"""LLM for several callers at once: streams in turn, threads, interrupts. Each gets its own, and the engine lives."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hotplug import LLM, SamplingParams
from hotplug.core.client import turns
from hotplug.core.client.llm import CompletionStream
from hotplug.core.client.outputs import CompletionChunk
from hotplug.core.client.turns import HeldSignals, Turns
from hotplug.core.errors import EngineDeadError, HotplugError, PromptTooLongError, RequestError
from hotplug.core.request import TokenDelta

pytestmark = pytest.mark.timeout(120)
PROMPTS = ["hello", [3, 4, 5], "a b c d e f g", [9] * 40, "hello world"]
PARAMS = [SamplingParams(temperature=0.0, max_tokens=7 + 5 * i, ignore_eos=True) for i in range(len(PROMPTS))]
ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> LLM:
    return LLM(str(tiny_model), load_format="dummy", max_model_len=512, max_num_seqs=4, kv_cache_memory="4MiB")


@pytest.fixture
def llm(engine: LLM) -> Iterator[LLM]:
    """The engine; a test leaves it as it found it: alive, with nothing running and no block in use."""
    yield engine
    gc.collect()
    assert not engine.core.has_work
    assert engine.core.stats().kv_blocks_used == 0
    assert engine.generate([3, 4], SamplingParams(max_tokens=2, ignore_eos=True), progress=False)


@pytest.fixture(scope="module")
def alone(engine: LLM) -> list[tuple[str, list[int]]]:
    """Text and tokens of each prompt when nothing else runs."""
    found = [engine.generate(p, q, progress=False)[0].outputs[0] for p, q in zip(PROMPTS, PARAMS, strict=True)]
    return [(output.text, output.token_ids) for output in found]


def joined(chunks: list[CompletionChunk]) -> tuple[str, list[int]]:
    return "".join(c.text for c in chunks), [t for c in chunks for t in c.token_ids]


def generated(llm: LLM, i: int) -> tuple[str, list[int]]:
    (output,) = llm.generate([PROMPTS[i]], PARAMS[i], progress=False)
    return output.outputs[0].text, output.outputs[0].token_ids


def test_streams_read_in_turn_each_get_their_own(llm: LLM, alone: Any) -> None:
    streams = [llm.stream(p, q) for p, q in zip(PROMPTS, PARAMS, strict=True)]
    got: list[list[CompletionChunk]] = [[] for _ in streams]
    live, draw = list(range(len(streams))), random.Random(0)
    while live:
        i = draw.choice(live)
        chunk = next(streams[i], None)
        if chunk is None:
            live.remove(i)
        else:
            got[i].append(chunk)
    assert [joined(chunks) for chunks in got] == alone
    assert [chunks[-1].finish_reason for chunks in got] == ["length"] * len(got)


def test_generate_beside_an_open_stream_takes_nothing_from_it(llm: LLM, alone: Any) -> None:
    stream = llm.stream(PROMPTS[4], PARAMS[4])
    chunks = [next(stream), next(stream)]
    assert [generated(llm, i) for i in (0, 1)] == alone[:2]
    assert joined(chunks + list(stream)) == alone[4]


def test_what_comes_while_nobody_reads_is_kept(llm: LLM, alone: Any) -> None:
    stream = llm.stream(PROMPTS[0], PARAMS[0])  # shorter than what follows
    assert generated(llm, 3) == alone[3]
    assert joined(list(stream)) == alone[0]


def test_threads_that_generate_stream_and_give_up_each_get_their_own(llm: LLM, alone: Any) -> None:
    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(12):
            i = draw.randrange(len(PROMPTS))
            match draw.choice(["generate", "stream", "leave", "batch"]):
                case "generate":
                    assert generated(llm, i) == alone[i]
                case "stream":
                    assert joined(list(llm.stream(PROMPTS[i], PARAMS[i]))) == alone[i]
                case "leave":
                    next(llm.stream(PROMPTS[i], PARAMS[i]))
                case "batch":
                    outputs = llm.generate(PROMPTS, PARAMS, progress=False)
                    assert [(o.outputs[0].text, o.outputs[0].token_ids) for o in outputs] == alone

    with ThreadPoolExecutor(6) as threads:
        for future in [threads.submit(work, seed) for seed in range(6)]:
            future.result()


def test_a_thread_that_only_begins_is_not_kept_out_by_one_that_goes_on(llm: LLM, alone: Any) -> None:
    begun, stop = threading.Event(), threading.Event()

    def endless() -> None:
        while not stop.is_set():
            for _ in llm.stream([3, 4, 5], ENDLESS):
                begun.set()
                if stop.is_set():
                    break

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(endless)
        try:
            assert begun.wait(30)
            assert generated(llm, 2) == alone[2]
            assert not running.done()
        finally:
            stop.set()
        running.result()


def test_event_loops_may_use_it_in_threads(llm: LLM, alone: Any) -> None:
    async def main() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(generated, llm, i) for i in range(len(PROMPTS))))

    assert asyncio.run(main()) == alone


def thrown(stream: CompletionStream) -> None:
    with pytest.raises(ZeroDivisionError):
        stream.throw(ZeroDivisionError)


@pytest.mark.parametrize("end", [CompletionStream.close, thrown, None], ids=["closed", "thrown into", "forgotten"])
def test_a_stream_that_ends_early_frees_its_blocks_at_once(llm: LLM, end: Any) -> None:
    stream = llm.stream([3] * 100, ENDLESS)
    next(stream)
    assert llm.core.stats().kv_blocks_used > 0
    if end is not None:
        end(stream)
    else:
        del stream
    assert llm.core.stats().kv_blocks_used == 0
    assert not llm.core.has_work


def test_a_closed_stream_gives_nothing_more(llm: LLM) -> None:
    stream = llm.stream([3, 4, 5], ENDLESS)
    next(stream)
    stream.close()
    stream.close()
    assert list(stream) == []


def test_a_stream_that_was_never_read_ends_with_its_object(llm: LLM) -> None:
    stream = llm.stream([3, 4, 5], ENDLESS)
    del stream
    assert not llm.core.has_work


def test_a_stream_is_closed_by_another_thread_while_it_is_read(llm: LLM) -> None:
    stream = llm.stream([3, 4, 5], ENDLESS)
    begun = threading.Event()

    def read() -> int:
        count = 0
        for _ in stream:
            count += 1
            begun.set()
        return count

    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read)
        assert begun.wait(30)
        stream.close()
        assert reading.result(30) >= 1


def test_a_stream_that_is_let_go_of_in_the_middle_of_a_step_ends(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, alone: Any
) -> None:
    forgotten = [llm.stream([3, 4, 5], ENDLESS)]
    next(forgotten[0])
    step = llm.core.step

    def collecting() -> Any:
        forgotten.clear()  # what the garbage collector may do anywhere
        return step()

    monkeypatch.setattr(llm.core, "step", collecting)
    assert generated(llm, 0) == alone[0]
    assert not llm.core.has_work


def test_several_completions_come_in_one_stream(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=6, ignore_eos=True)
    (whole,) = llm.generate([3, 4, 5], params, progress=False)
    chunks = list(llm.stream([3, 4, 5], params))
    for output in whole.outputs:
        own = [chunk for chunk in chunks if chunk.index == output.index]
        assert joined(own) == (output.text, output.token_ids)


def test_one_prompt_given_twice_is_answered_twice(llm: LLM, alone: Any) -> None:
    prompt = [3, 4, 5]
    outputs = llm.generate([prompt, prompt], PARAMS[1], progress=False)
    assert [o.outputs[0].token_ids for o in outputs] == [alone[1][1]] * 2


def test_prompts_of_all_forms_give_the_same(llm: LLM, alone: Any) -> None:
    ids = llm.tokenizer.encode("hello")
    forms = [
        "hello",
        ids,
        {"prompt": "hello"},
        {"prompt_token_ids": ids},
        {"input_ids": ids},
        llm.tokenizer.backend.encode("hello"),
    ]
    outputs = llm.generate(iter(forms), PARAMS[0], progress=False)
    assert [(o.outputs[0].text, o.outputs[0].token_ids) for o in outputs] == [alone[0]] * len(forms)
    assert [o.prompt for o in outputs] == ["hello", None, "hello", None, None, None]
    assert [joined(list(llm.stream(form, PARAMS[0]))) for form in forms] == [alone[0]] * len(forms)


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], progress=False) == []
    assert llm.chat([], progress=False) == []


@pytest.mark.parametrize("prompt", ["", [], {"prompt": ""}, {"prompt_token_ids": []}, {"input_ids": []}])
def test_an_empty_prompt_is_refused(llm: LLM, prompt: Any) -> None:
    with pytest.raises(RequestError, match="empty"):
        llm.generate([prompt], progress=False)
    with pytest.raises(RequestError, match="empty"):
        next(llm.stream(prompt))


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.generate(b"abc"),
        lambda llm: llm.generate(["a", None]),
        lambda llm: llm.generate(["a"], [SamplingParams()] * 2),
        lambda llm: llm.generate("a", {"max_tokens": 1}),
        lambda llm: llm.generate(["a", [999]]),
        lambda llm: llm.generate(["a", [2**40]]),
        lambda llm: llm.generate(["a", [-1]]),
        lambda llm: llm.generate(["a", [3] * 600]),
        lambda llm: llm.chat("hello"),
        lambda llm: llm.chat([{"role": "user"}, "x"]),
        lambda llm: llm.stream(["a", "b"]),
        lambda llm: llm.stream("a", [SamplingParams()] * 2),
        lambda llm: llm.chat_stream([[{"role": "user", "content": "a"}]]),
        lambda llm: next(llm.stream([3] * 600)),
    ],
)  # fmt: skip
def test_what_is_odd_is_refused_and_costs_an_open_stream_nothing(
    llm: LLM, alone: Any, call: Callable[[LLM], Any]
) -> None:
    stream = llm.stream(PROMPTS[0], PARAMS[0])
    chunks = [next(stream)]
    with pytest.raises(RequestError):
        call(llm)
    assert joined(chunks + list(stream)) == alone[0]


def test_a_refused_prompt_ends_its_own_call_alone(llm: LLM, alone: Any) -> None:
    def refused() -> None:
        with pytest.raises(PromptTooLongError):
            llm.generate([*PROMPTS, [3] * 600], progress=False)

    with ThreadPoolExecutor(4) as threads:
        wrong = [threads.submit(refused) for _ in range(8)]
        right = [threads.submit(generated, llm, i) for i in range(len(PROMPTS))]
        assert [future.result() for future in right] == alone
        for future in wrong:
            future.result()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1"])
def test_an_interrupt_in_a_step_waits_for_its_end(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, alone: Any, name: str
) -> None:
    class Interrupt(BaseException): ...

    def handler(*_: object) -> None:
        raise Interrupt

    number = getattr(signal, name)
    before = signal.signal(number, handler)
    try:
        other = llm.stream(PROMPTS[0], PARAMS[0])
        chunks = [next(other)]
        step = llm.core.step

        def interrupted() -> Any:
            signal.raise_signal(number)
            return step()

        with monkeypatch.context() as patch, pytest.raises(Interrupt):
            patch.setattr(llm.core, "step", interrupted)
            generated(llm, 3)
        assert signal.getsignal(number) is handler
        assert joined(chunks + list(other)) == alone[0]  # nothing lost of the step that was interrupted
    finally:
        signal.signal(number, before)


def test_an_interrupted_stream_goes_on_where_it_was(llm: LLM, monkeypatch: pytest.MonkeyPatch, alone: Any) -> None:
    stream = llm.stream(PROMPTS[0], PARAMS[0])
    chunks = [next(stream)]
    step = llm.core.step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm.core, "step", lambda: (signal.raise_signal(signal.SIGINT), step())[1])
        next(stream)
    assert joined(chunks + list(stream)) == alone[0]


def test_an_interrupt_that_comes_again_later_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), HeldSignals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # pressed twice
        done.append(1)
        monkeypatch.setattr(turns, "PATIENCE", 0.0)
        signal.raise_signal(signal.SIGINT)
        done.append(2)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_turn_goes_round_in_the_order_of_asking() -> None:
    turn, order = Turns(), []

    def ask(i: int) -> None:
        with turn:
            order.append(i)

    with turn:
        assert not turn.take_if_free()
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(5)]
        for i, thread in enumerate(threads):
            thread.start()
            while len(turn._waiting) <= i:
                threading.Event().wait(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(5))
    assert turn.take_if_free()


def test_use_from_within_a_step_is_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch, alone: Any) -> None:
    step, refused = llm.core.step, []

    def inside() -> Any:
        if not refused:
            with pytest.raises(HotplugError, match="from within its own step") as caught:
                llm.generate("a", progress=False)
            refused.append(caught.value)
        return step()

    monkeypatch.setattr(llm.core, "step", inside)
    assert generated(llm, 0) == alone[0]
    assert refused


def test_a_request_that_fails_keeps_the_others_outputs(llm: LLM, monkeypatch: pytest.MonkeyPatch, alone: Any) -> None:
    """As a row does whose scores are not numbers: the engine ends it with the reason "error"."""
    step, failed = llm.core.step, []

    def failing() -> list[TokenDelta]:
        found = list(step())
        if not failed:
            failed.append(found[1].request_id)
            llm.core.abort(failed[0])
            found[1] = TokenDelta(failed[0], [], finish_reason="error", error="the scores are not numbers")
        return found

    monkeypatch.setattr(llm.core, "step", failing)
    outputs = [o.outputs[0] for o in llm.generate(PROMPTS[:3], PARAMS[:3], progress=False)]
    assert [(o.text, o.token_ids, o.error) for o in (outputs[0], outputs[2])] == [(*alone[0], ""), (*alone[2], "")]
    assert (outputs[1].finish_reason, outputs[1].error) == ("error", "the scores are not numbers")


def test_a_request_whose_text_fails_keeps_the_others_outputs(
    llm: LLM, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hotplug.core.text.detokenizer import Detokenizer

    push = Detokenizer.push
    monkeypatch.setattr(Detokenizer, "push", lambda self, ids: 1 / 0 if self._stop else push(self, ids))
    broken = SamplingParams(temperature=0.0, stop=("zzz",), max_tokens=9)
    outputs = [o.outputs[0] for o in llm.generate(PROMPTS[:2], [PARAMS[0], broken], progress=False)]
    assert (outputs[0].text, outputs[0].token_ids) == alone[0]
    assert outputs[1].finish_reason == "error"
    assert "ZeroDivisionError" in outputs[1].error
    (chunk,) = llm.stream("a", broken)
    assert (chunk.finish_reason, chunk.error) == ("error", outputs[1].error)


def test_an_llm_is_not_copied(llm: LLM) -> None:
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="make one in the process that uses it"):
            copied(llm)


def test_close_ends_what_runs_and_what_comes_later(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), load_format="dummy", max_model_len=512, kv_cache_memory="4MiB")
    stream, begun = llm.stream("a", ENDLESS), threading.Event()

    def read() -> None:
        for _ in stream:
            begun.set()

    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read)
        assert begun.wait(30)
        llm.close()
        llm.close()
        with pytest.raises(EngineDeadError, match="the engine was closed"):
            reading.result(30)
    for use in (llm.generate, llm.stream):
        with pytest.raises(EngineDeadError, match="the engine was closed"):
            use("a")


def test_after_a_failed_step_all_are_told(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), load_format="dummy", max_model_len=512, kv_cache_memory="4MiB")
    first, second = llm.stream("a", ENDLESS), llm.stream("b", ENDLESS)
    next(first)
    llm.core._executor.execute = lambda plan: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    next(second)  # came with the first step
    with pytest.raises(ZeroDivisionError):
        next(first)
    for use in (lambda: next(second), lambda: llm.generate("c", progress=False)):
        with pytest.raises(EngineDeadError, match=r"a step failed: ZeroDivisionError.*Start a new engine"):
            use()


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_does_not_end_it_before_min_tokens(llm: LLM, speculative: bool, include: bool) -> None:
    whole = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, skip_special_tokens=False)
    (plain,) = llm.generate([3, 4, 5, 3, 4, 5], whole, progress=False)
    ids, texts = plain.outputs[0].token_ids, [llm.tokenizer.token_text(t) for t in plain.outputs[0].token_ids]
    stop = next(t for t in texts if len(t) == 1 and t.isascii() and texts.count(t) > 3)
    for min_tokens in (1, 7, 20, 59, 60):
        params = SamplingParams(
            temperature=0.0, max_tokens=60, min_tokens=min_tokens, ignore_eos=True, skip_special_tokens=False,
            stop=(stop,), include_stop_str_in_output=include, speculative=speculative,
        )  # fmt: skip
        end = next((i for i in range(min_tokens, 60) if texts[i] == stop), None)
        (output,) = llm.generate([3, 4, 5, 3, 4, 5], params, progress=False)
        chunks = list(llm.stream([3, 4, 5, 3, 4, 5], params))
        expected = (ids, "length") if end is None else (ids[: end + 1], "stop")
        assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == expected
        assert joined(chunks) == (output.outputs[0].text, expected[0])
        shown = expected[0] if end is None or include else expected[0][:-1]
        assert output.outputs[0].text == llm.tokenizer.decode(shown, skip_special_tokens=False)
