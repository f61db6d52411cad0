"""The front end's batched path: the same text as one delta at a time, in order and whole, however slowly it is read."""

from __future__ import annotations

import asyncio
import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logprob_columns import of_prompt

from hotplug.core.client.mailbox import Mailbox
from hotplug.core.client.outputs import Completion, CompletionChunk
from hotplug.core.client.streams import Streams
from hotplug.core.client.submission import Submission
from hotplug.core.engine.messages import Outputs
from hotplug.core.errors import EngineDeadError, QueueFullError
from hotplug.core.logprobs import TokenLogprobs
from hotplug.core.request import EngineStats, SamplingParams, TokenDelta
from hotplug.core.scheduler.tokens import StepTokens
from hotplug.core.text.tokenizer import Tokenizer
from hotplug.core.text.tokenizer_files import load_tokenizer

EOS = (1,)
RELAXED = settings(deadline=None, max_examples=200, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model)


def step(tags: list[int], tokens: list[int], deltas: list[TokenDelta] | None = None) -> Outputs:
    ids = np.array([""] * len(tags), np.object_)
    return Outputs.of(
        StepTokens(np.array(tags, np.int64), np.array(tokens, np.int32), ids, deltas or []), EngineStats()
    )


def drain(mailbox: Mailbox) -> list[CompletionChunk]:
    """All that waits."""

    async def take() -> list[CompletionChunk]:
        return [await mailbox.get() for _ in range(len(mailbox))]

    return asyncio.run(take())


def whole(chunks: list[CompletionChunk], index: int = 0) -> tuple[Any, ...]:
    own = [chunk for chunk in chunks if chunk.index == index]
    end = own[-1] if own else CompletionChunk(0, "", [])
    return (
        "".join(chunk.text for chunk in own), [token for chunk in own for token in chunk.token_ids],
        [entry for chunk in own for entry in chunk.logprobs or ()], end.finish_reason, end.stop_reason,
    )  # fmt: skip


@RELAXED
@given(data=st.data())
def test_the_batched_path_gives_what_deltas_one_by_one_give(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Random texts, cut anywhere into bytes, with stop strings, ends, and steps that are deltas, read now and then."""
    streams, mailboxes, plain, scripts = Streams(3), [], [], []
    for number in range(data.draw(st.integers(1, 3))):
        text = data.draw(st.text("ab#é日🎉", min_size=1, max_size=12)).encode()
        spoiled = data.draw(st.lists(st.integers(0, 257), max_size=3))
        tokens = [tokenizer.encode("a")[0] if byte >= 258 else byte for byte in spoiled]
        tokens += [_byte_tokens(tokenizer)[byte] for byte in text]
        stop = tuple(data.draw(st.lists(st.text("ab#é🎉", min_size=1, max_size=3), max_size=2)))
        params = SamplingParams(
            stop=stop, include_stop_str_in_output=data.draw(st.booleans()),
            skip_special_tokens=data.draw(st.booleans()),
        )  # fmt: skip
        submission = Submission(str(number), [2], params, tokenizer, EOS, tags=streams.tags)
        mailboxes.append(streams.open(submission))
        plain.append(Completion(0, params, tokenizer, EOS, [2]))
        scripts.append((submission.requests[0], tokens))
    expected: list[list[CompletionChunk]] = [[] for _ in scripts]
    found: list[list[CompletionChunk]] = [[] for _ in scripts]
    ended: set[str] = set()
    for at in range(max(len(tokens) for _, tokens in scripts)):
        tags, column, deltas = [], [], []
        for number, (request, tokens) in enumerate(scripts):
            if at >= len(tokens):
                continue
            last = at + 1 == len(tokens)
            logprobs = [TokenLogprobs([tokens[at]], [-1.0], 1)] if data.draw(st.booleans()) else None
            delta = TokenDelta(request.id, [tokens[at]], "length" if last else None, logprobs=logprobs, tag=request.tag)
            if not plain[number].finished:
                expected[number].append(plain[number].push(copy.deepcopy(delta)))
            if last or logprobs or at == 0:
                deltas.append(delta)
            else:
                tags.append(request.tag)
                column.append(tokens[at])
        ended |= set(streams.take(step(tags, column, deltas), 1.0, None))
        for number, mailbox in enumerate(mailboxes):
            assert len(mailbox) <= 1, "more than one chunk waits"
            if data.draw(st.booleans()):
                found[number] += drain(mailbox)
    for number, mailbox in enumerate(mailboxes):
        found[number] += drain(mailbox)
        assert whole(found[number]) == whole(expected[number])
        by_stop = expected[number][-1].stop_reason is not None and len(expected[number]) < len(scripts[number][1])
        assert (str(number) in ended) == by_stop or not by_stop
    assert streams.fail("over") == []


@cache
def _byte_tokens(tokenizer: Tokenizer) -> dict[int, int]:
    """The token of each byte: the tiny vocabulary has one for each."""
    return {tokenizer.token_bytes(token)[0]: token for token in range(2, tokenizer.vocab_size)}


@RELAXED
@given(data=st.data())
def test_merging_keeps_order_and_loses_nothing(data: st.DataObject) -> None:
    mailbox, sent, read = Mailbox(), [], []
    for number in range(data.draw(st.integers(1, 30))):
        index, kind = data.draw(st.integers(0, 2)), data.draw(st.sampled_from(["token", "chunk", "read"]))
        if kind == "read":
            read += drain(mailbox)
        elif kind == "token":
            sent.append(CompletionChunk(index, f"{number},", [number]))
            mailbox.put_token(index, f"{number},", number)
        else:
            made = [CompletionChunk(index, f"{number};", [number, number], [TokenLogprobs([number], [0.0], 1)])
                    for _ in range(2)]  # fmt: skip
            sent.append(made[0])
            mailbox.put(made[1])
        assert len(mailbox) <= 3
    read += drain(mailbox)
    for index in range(3):
        assert whole(read, index) == whole(sent, index)


def test_a_slow_reader_gets_one_chunk_with_the_end(tokenizer: Tokenizer) -> None:
    streams = Streams(0)
    submission = Submission("r", [2], SamplingParams(), tokenizer, EOS, tags=streams.tags)
    mailbox, (request,) = streams.open(submission), submission.requests
    a, b = (_byte_tokens(tokenizer)[ord(c)] for c in "ab")
    first = TokenDelta("r", [a], num_cached_tokens=5, prompt_logprobs=of_prompt([], 0), tag=request.tag)
    streams.take(step([], [], [first]), 1.0, None)
    for _ in range(1000):
        streams.take(step([request.tag], [b]), 1.0, None)
    streams.take(step([], [], [TokenDelta("r", [a, 1], "stop", 1, tag=request.tag)]), 1.0, None)
    assert len(mailbox) == 1
    (chunk,) = drain(mailbox)
    assert chunk.prompt_logprobs is not None and list(chunk.prompt_logprobs) == [None]
    assert (chunk.text, chunk.num_cached_tokens) == ("a" + "b" * 1000 + "a", 5)
    assert (len(chunk.token_ids), chunk.finish_reason) == (1003, "stop")


def test_what_came_before_an_error_is_read_before_it(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        streams = Streams(0)
        submission = Submission("r", [2], SamplingParams(n=2), tokenizer, EOS, tags=streams.tags)
        mailbox = streams.open(submission)
        streams.take(step([r.tag for r in submission.requests], [5, 6]), 1.0, None)
        assert sorted(streams.fail("it broke")) == ["r.0", "r.1"]
        assert [(await mailbox.get()).token_ids for _ in range(2)] == [[5], [6]]
        with pytest.raises(EngineDeadError, match="it broke"):
            await mailbox.get()

    asyncio.run(main())


def test_a_waiting_reader_is_woken_by_tokens_and_by_refusals(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        streams = Streams(0)
        submission = Submission("r", [2], SamplingParams(), tokenizer, EOS, tags=streams.tags)
        mailbox, (request,) = streams.open(submission), submission.requests
        reader = asyncio.ensure_future(mailbox.get())
        await asyncio.sleep(0)
        streams.take(step([request.tag], [5]), 1.0, None)
        assert (await reader).token_ids == [5]
        reader = asyncio.ensure_future(mailbox.get())
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        reader = asyncio.ensure_future(mailbox.get())
        await asyncio.sleep(0)
        streams.refuse(request.tag, QueueFullError("full", retry_after=1))
        with pytest.raises(QueueFullError):
            await reader

    asyncio.run(main())


def test_a_late_token_of_an_aborted_request_reaches_nobody(tokenizer: Tokenizer) -> None:
    streams = Streams(0)
    first = Submission("a", [2], SamplingParams(), tokenizer, EOS, tags=streams.tags)
    streams.open(first)
    assert streams.close(first) == ["a"] and streams.close(first) == []
    second = Submission("b", [2], SamplingParams(), tokenizer, EOS, tags=streams.tags)
    mailbox = streams.open(second)
    assert second.requests[0].tag != first.requests[0].tag
    streams.take(step([first.requests[0].tag], [5]), 1.0, None)
    assert len(mailbox) == 0


def test_the_observer_is_told_once_a_step(tokenizer: Tokenizer) -> None:
    calls: list[tuple[Any, ...]] = []

    class Observer:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: calls.append((name, *args))

    streams = Streams(0)
    submission = Submission("r", [2], SamplingParams(n=2), tokenizer, EOS, tags=streams.tags)
    streams.open(submission)
    tags = [request.tag for request in submission.requests]
    firsts = [TokenDelta(r.id, [5], tag=r.tag) for r in submission.requests]
    streams.take(step([], [], firsts), 10.0, Observer())  # type: ignore[arg-type]
    calls.clear()
    streams.take(step(tags, [5, 6]), 12.5, Observer())  # type: ignore[arg-type]
    assert calls == [("inter_tokens", [2.5, 2.5])]


def test_the_observer_is_told_of_every_end(tokenizer: Tokenizer) -> None:
    ends: list[str] = []

    class Observer:
        def finished(self, reason: str, *_: Any) -> None:
            ends.append(reason)

        def __getattr__(self, name: str) -> Any:
            return lambda *args: None

    streams, observer = Streams(0), Observer()
    given_up, failed = (
        Submission(name, [2], SamplingParams(n=2), tokenizer, EOS, tags=streams.tags) for name in ("a", "b")
    )
    for submission in (given_up, failed):
        streams.open(submission)
    streams.close(given_up, observer)  # type: ignore[arg-type]
    error = TokenDelta(failed.requests[0].id, [], "error", error="no scores", tag=failed.requests[0].tag)
    streams.take(step([], [], [error]), 1.0, observer)  # type: ignore[arg-type]
    streams.refuse(failed.requests[1].tag, QueueFullError("full", retry_after=1))
    streams.close(failed, observer)  # type: ignore[arg-type]
    assert ends == ["abort", "abort", "error"]


def test_the_prompts_log_probabilities_come_with_the_first_of_several_completions_alone(tokenizer: Tokenizer) -> None:
    params = SamplingParams(n=3, seed=2**63 - 1, prompt_logprobs=2)
    requests = Submission("r", [2], params, tokenizer, EOS).requests
    assert [r.sampling.prompt_logprobs for r in requests] == [2, None, None]
    assert [r.sampling.seed for r in requests] == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert {r.sampling.n for r in requests} == {1}
