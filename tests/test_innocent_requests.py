"""No request harms another: while what cannot be sent, taken or shown arrives, all others get their right answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from hotplug import LLM, AsyncLLM, SamplingParams
from hotplug.core.client.outputs import Completion
from hotplug.core.client.submission import Submission
from hotplug.core.config import EngineConfig
from hotplug.core.engine import messages
from hotplug.core.engine import process as engine_process
from hotplug.core.engine.core import EngineCore
from hotplug.core.engine.process import EngineProcess
from hotplug.core.errors import EngineDeadError, HotplugError, RequestError
from hotplug.core.request import EngineStats, Request, TokenDelta, changed
from hotplug.core.scheduler.tokens import StepTokens

pytestmark = pytest.mark.timeout(180)

VOCAB, CONTEXT, INNOCENTS = 258, 256, 24
OPTIONS: dict[str, Any] = {
    "max_model_len": CONTEXT, "kv_cache_memory": "16MiB", "max_num_seqs": 8, "load_format": "dummy",
}  # fmt: skip
HALF = "\ud83d"


def innocent(number: int) -> tuple[list[int], SamplingParams]:
    """A prompt and parameters whose answer is the same each time."""
    params = SamplingParams(temperature=0.9 * (number % 2), seed=number, max_tokens=30, ignore_eos=True)
    return [3 + number, 4, 5 + number % 7], params


ASKED: list[dict[str, Any]] = [
    *[{"prompt": prompt} for prompt in (
        [], [-1], [VOCAB], [2**31], [2**70], [1.5], ["a"], [None], [[1], [1, 2]], [[1, 2]], HALF, 5, {"a": 1},
        np.array(5), np.array([1.5]), [3] * CONTEXT)],
    *[{"priority": value} for value in (2**31, 2**63, 2**2000, 1.5, None)],
    *[{"cache_salt": value} for value in (HALF, "a" * 100_000, 5)],
    *[{"request_id": value} for value in (HALF, 5, "a" * 100_000)],
    {"params": "greedy"}, {"params": {"n": 2}},
    *[{"params": SamplingParams(**values)} for values in (
        {"stop_token_ids": list(range(VOCAB)), "min_tokens": 4},
        {"stop_token_ids": [VOCAB]}, {"logit_bias": {VOCAB: 1.0}}, {"logit_bias": {2**31 - 1: 1.0}},
        {"min_tokens": CONTEXT - 1}, {"min_tokens": 2**31 - 1}, {"min_tokens": CONTEXT, "max_tokens": CONTEXT},
        {"logits_processors": {"none": {"a": 1}}}, {"n": 3, "stop_token_ids": [2**31 - 1]})],
]  # fmt: skip
"""What a caller may ask, and is refused."""

PAST_THE_CHECKS: list[dict[str, Any]] = [
    {"id": HALF}, {"cache_salt": HALF}, {"cache_salt": 5}, {"priority": 2**64}, {"priority": "first"},
    {"eos_token_ids": (2**64,)}, {"eos_token_ids": (1.5,)}, {"arrival": "now"}, {"prompt_token_ids": [2**70]},
    {"prompt_token_ids": object()},
    *[{"sampling": values} for values in (
        {"top_k": 2**64}, {"top_k": 2.5}, {"prompt_logprobs": 2.0}, {"min_tokens": 2**70}, {"seed": -(2**64)},
        {"logits_processors": {"x": {"a": 2**64}}}, {"logits_processors": {"x": {"a": object()}}},
        {"logits_processors": {HALF: {}}}, {"logits_processors": {1: {}}}, {"logit_bias": {"a": 1.0}},
        {"logit_bias": {-1: 1.0}}, {"stop_token_ids": (-1,)}, {"stop_token_ids": (2**64,)}, {"ignore_eos": 1})],
]  # fmt: skip
"""What the checks keep out: that one of them is wrong some day may cost one request."""


def spoiled(submission: Submission, values: dict[str, Any]) -> Submission:
    """With requests that no check would let pass."""
    if isinstance(sampling := values.get("sampling"), dict):
        values = {"sampling": changed(submission.requests[0].sampling, **sampling)}
    submission.requests = [changed(request, **values) for request in submission.requests]
    completions = submission.completions.values()
    submission.completions = {r.id: c for r, c in zip(submission.requests, completions, strict=True)}
    return submission


def nonsense(tag: int) -> Iterator[list[bytes]]:
    """Messages that are none."""
    yield from ([b""], [b"\xff" * 9], [b"\x80"], [b"\xc1", b"x"], [b"", b"", b""])
    prompt = np.array([1, 2], np.int32).tobytes()
    bare = Request(id="x", prompt_token_ids=(), sampling=SamplingParams(), tag=tag)
    good = msgspec.Raw(messages.encode(bare))
    bad = msgspec.Raw(messages.encode({"id": "y"}))
    yield [messages.encode(messages.Add([bad], [0], [tag])), prompt]
    yield [messages.encode(messages.Add([good], [5], [tag])), prompt]
    yield [messages.encode(messages.Add([good], [0], [tag])), b"abc"]
    yield [messages.encode(messages.Add([good, good], [0], [tag])), prompt]
    for other in (-1, 99 << 32, 2**63 - 1, -(2**63)):
        yield [messages.encode(messages.Add([good], [0], [other])), prompt]
    for message in (
        messages.Abort(["unknown", ""]), messages.Explain(77), messages.Explain(-1), messages.Explain(2**60),
        messages.ClientGone(77), messages.ClientGone(-1, 3), messages.ClientBack(2**40),
    ):  # fmt: skip
        yield [messages.encode(message)]


@contextlib.asynccontextmanager
async def serving(model: Path, **options: Any) -> AsyncIterator[AsyncLLM]:
    llm = AsyncLLM(EngineConfig(model=str(model), **{**OPTIONS, **options}))
    await llm.start()
    try:
        await asyncio.wait_for(llm.wait_ready(), 60)
        yield llm
    finally:
        await llm.close()


async def tokens(llm: AsyncLLM, number: int) -> list[int]:
    output = await llm.generate(*innocent(number))
    return output.outputs[0].token_ids


async def expect_refusal(llm: AsyncLLM, asked: dict[str, Any]) -> None:
    given: dict[str, Any] = {"prompt": [5, 6], "params": SamplingParams(max_tokens=4), **asked}
    with pytest.raises(RequestError):
        async for _ in llm.stream(given.pop("prompt"), given.pop("params"), **given):
            pass


async def expect_error(llm: AsyncLLM, values: dict[str, Any]) -> None:
    submission = Submission(
        llm._new_id(), [5, 6], SamplingParams(max_tokens=4), llm.tokenizer, (1,), tags=llm._streams.tags
    )
    with pytest.raises(HotplugError) as caught:
        async for _ in llm._run(spoiled(submission, values)):
            pass
    assert not isinstance(caught.value, EngineDeadError)


def test_innocent_requests_get_their_answers_whatever_arrives_beside_them(tiny_model: Path) -> None:
    async def main() -> None:
        async with serving(tiny_model) as llm:
            alone = [await tokens(llm, number) for number in range(INNOCENTS)]
            assert len({tuple(answer) for answer in alone}) > INNOCENTS // 2, "a mix-up would not be seen"

            async def beside(guilty: list[Coroutine[Any, Any, None]]) -> None:
                """All at once: what is sent in one turn goes in one message."""
                half = len(guilty) // 2
                asked = [tokens(llm, number) for number in range(INNOCENTS)]
                done = await asyncio.wait_for(asyncio.gather(*guilty[:half], *asked, *guilty[half:]), 60)
                assert [answer for answer in done if answer is not None] == alone

            for values in PAST_THE_CHECKS:
                await beside([expect_error(llm, values), expect_error(llm, values)])
            await beside([expect_error(llm, values) for values in PAST_THE_CHECKS])
            await beside([expect_refusal(llm, asked) for asked in ASKED])

            await beside([_post(llm, frames) for frames in nonsense(7)])
            assert (await llm.explain())["plan_hash"] == llm.plan_hash and llm.stalled is None

    asyncio.run(main())


async def _post(llm: AsyncLLM, frames: list[bytes]) -> None:
    llm._send.send_multipart(frames)


def test_the_same_holds_offline(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), **OPTIONS)
    asked = [innocent(number) for number in range(INNOCENTS)]
    prompts, params = [prompt for prompt, _ in asked], [one for _, one in asked]
    alone = [output.outputs[0].token_ids for output in llm.generate(prompts, params, progress=False)]
    core, gained = llm.core, {str(number): list[int]() for number in range(INNOCENTS)}
    for number, (prompt, sampling) in enumerate(asked):
        core.add(Request(id=str(number), prompt_token_ids=prompt, sampling=sampling))
    wrong = [asked for asked in ASKED if "request_id" not in asked]

    def add(prompt: Any = (5, 6), params: Any = asked[0][1], **values: Any) -> None:
        core.add(Request(id="guilty", prompt_token_ids=prompt, sampling=params, **values))

    while core.has_work:
        for values in wrong[:3]:
            with pytest.raises(RequestError):
                add(**values)
        wrong = wrong[3:] + wrong[:3]
        for delta in core.step():
            gained[delta.request_id] += delta.token_ids
    assert list(gained.values()) == alone


def test_an_end_of_sequence_outside_the_vocabulary_is_ignored(tiny_model: Path) -> None:
    core = EngineCore(EngineConfig(model=str(tiny_model), **OPTIONS))
    last = SamplingParams(temperature=0.0, logit_bias={VOCAB - 1: 100.0}, max_tokens=4, min_tokens=2)
    core.add(Request(id="a", prompt_token_ids=[3], sampling=last, eos_token_ids=(-1, VOCAB, 2**32 - 1, -(2**63), 1)))
    found = [token for _ in range(20) if core.has_work for delta in core.step() for token in delta.token_ids]
    assert found == [VOCAB - 1] * 4
    own = SamplingParams(temperature=0.0, logit_bias={1: 100.0}, max_tokens=4)
    core.add(Request(id="b", prompt_token_ids=[3], sampling=own, eos_token_ids=(-1, 1, 2**40)))
    ends = [delta for _ in range(20) if core.has_work for delta in core.step()]
    assert [delta.finish_reason for delta in ends][-1] == "stop" and ends[-1].stop_token == 1


def test_min_tokens_above_what_the_context_leaves_is_refused_by_name(tiny_model: Path) -> None:
    core = EngineCore(EngineConfig(model=str(tiny_model), **OPTIONS))
    prompt = [3] * 56
    core.add(Request(id="a", prompt_token_ids=prompt, sampling=SamplingParams(min_tokens=200)))
    with pytest.raises(RequestError, match=r"min_tokens is 201, but the prompt has 56 tokens.*at most 200") as caught:
        core.add(Request(id="b", prompt_token_ids=prompt, sampling=SamplingParams(min_tokens=201)))
    assert caught.value.param == "min_tokens"


class BrokenCore:
    """An engine whose `add` and `report` fail in a way that nobody foresaw, for some."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.taken: list[str] = []

    has_work = True

    def add(self, request: Request) -> None:
        if request.id == "guilty":
            raise self.error
        self.taken.append(request.id)

    def report(self) -> dict[str, Any]:
        return {"path": self.error}

    def abort(self, request_id: str) -> bool:
        raise self.error


class Posted:
    """Front ends that keep what they are told."""

    def __init__(self) -> None:
        self.told: list[messages.FromEngine] = []

    def gone(self, client: int) -> bool:
        return client != 0

    def post(self, client: int, message: messages.FromEngine) -> None:
        messages.encode(message)
        self.told.append(message)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Callable[[Exception], tuple[EngineProcess, Any]]]:
    """An engine's loop around a `BrokenCore`, and the socket to send to it."""
    context = zmq.Context()
    inbox, sender = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.bind(f"ipc://{tmp_path}/in")
    sender.connect(f"ipc://{tmp_path}/in")

    def make(error: Exception) -> tuple[EngineProcess, Any]:
        process = EngineProcess.__new__(EngineProcess)
        process._inbox, process._clients, process._core = inbox, Posted(), BrokenCore(error)  # type: ignore[assignment]
        process._parent_pid, process._stopped = None, False
        return process, sender

    yield make
    context.destroy(linger=0)


ERRORS = [KeyError("x"), OverflowError(2**70), MemoryError(), RecursionError(),
          UnicodeEncodeError("utf-8", HALF, 0, 1, HALF), RequestError(HALF, param=HALF)]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_one_request_raises_in_the_engine_is_told_to_its_front_end_alone(
    error: Exception, engine: Callable[[Exception], tuple[EngineProcess, Any]]
) -> None:
    process, sender = engine(error)
    asked = [
        Request(id=name, prompt_token_ids=[1], sampling=SamplingParams(), tag=tag)
        for tag, name in enumerate(("a", "guilty", "b"))
    ]
    sender.send_multipart(messages.add_frames(asked)[0])
    sender.send(messages.encode(messages.Abort(["a"])))
    sender.send(messages.encode(messages.Explain(0)))
    sender.send(messages.encode(messages.Stop()))
    while not process._stopped:
        process._inbox.poll(5000)
        process._read()
    refused, plan = process._clients.told  # type: ignore[attr-defined]
    assert process._core.taken == ["a", "b"]  # type: ignore[attr-defined]
    assert isinstance(refused, messages.Refused) and refused.request_tag == 1
    assert refused.kind == ("request" if isinstance(error, RequestError) else "failed")
    assert isinstance(plan, messages.PlanReport) and not plan.report and "TypeError" in plan.error


def test_a_flood_of_requests_does_not_keep_running_ones_from_their_next_step(
    engine: Callable[[Exception], tuple[EngineProcess, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, sender = engine(KeyError("x"))
    core: Any = process._core
    clock = SimpleNamespace(monotonic=lambda: 0.001 * len(core.taken))  # a millisecond a request
    monkeypatch.setattr(engine_process, "time", clock)
    for number in range(30):
        asked = Request(id=str(number), prompt_token_ids=[1], sampling=SamplingParams())
        sender.send_multipart(messages.add_frames([asked])[0])
    process._inbox.poll(5000)
    process._read()
    assert len(core.taken) == 11
    core.has_work = False
    while len(core.taken) < 30:
        process._inbox.poll(5000)
        process._read()


def test_an_engine_that_is_dead_is_not_kept_alive(engine: Callable[[Exception], tuple[EngineProcess, Any]]) -> None:
    process, sender = engine(EngineDeadError("a rank has ended"))
    asked = Request(id="guilty", prompt_token_ids=[1], sampling=SamplingParams())
    sender.send_multipart(messages.add_frames([asked])[0])
    process._inbox.poll(5000)
    with pytest.raises(EngineDeadError):
        process._read()


def test_what_cannot_be_told_of_one_request_is_its_own_error() -> None:
    deltas = [TokenDelta("a", [1], tag=1), TokenDelta("b", [object()], tag=2), TokenDelta("c", [3], tag=3)]  # type: ignore[list-item]
    step = StepTokens(np.array([9]), np.array([4], np.int32), np.array(["d"], np.object_), deltas)
    sent = messages.decode_from_engine(messages.encode_outputs(step, EngineStats()))
    assert isinstance(sent, messages.Outputs)
    assert [(d.tag, d.token_ids, d.finish_reason) for d in sent.deltas] == [
        (1, [1], None),
        (2, [], "error"),
        (3, [3], None),
    ]
    assert sent.columns()[0].tolist() == [9]


def test_tokens_that_cannot_be_made_into_text_end_their_request_alone(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        plain = Completion.push_token

        def push_token(self: Completion, token: int) -> str:
            if self._params.stop == ("guilty",) and self.num_tokens > 3:
                raise IndexError("no such piece")
            return plain(self, token)

        monkeypatch.setattr(Completion, "push_token", push_token)
        async with serving(tiny_model) as llm:
            alone = [await tokens(llm, number) for number in range(6)]
            guilty = SamplingParams(stop=("guilty",), max_tokens=100, ignore_eos=True)

            async def expect() -> None:
                with pytest.raises(HotplugError, match="cannot be made into text"):
                    await llm.generate([3], guilty)

            asked = (tokens(llm, number) for number in range(6))
            _, *answers = await asyncio.wait_for(asyncio.gather(expect(), *asked), 30)
            assert answers == alone

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert "no such piece" in caplog.text


def test_two_requests_of_one_name_do_not_end_each_other(tiny_model: Path) -> None:
    async def main() -> None:
        async with serving(tiny_model) as llm:
            prompt, params = innocent(1)
            alone = await tokens(llm, 1)
            first = llm.stream(prompt, params, request_id="same")
            found = (await anext(first)).token_ids
            second = llm.stream(prompt, params, request_id="same")
            await anext(second)
            await second.aclose()
            async for chunk in first:
                found += chunk.token_ids
            assert found == alone

    asyncio.run(main())
