"""POST /v1/completions: text or token ids in, text out; also scores prompts (echo with logprobs)."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hotplug.core.errors import RequestError
from hotplug.server.body import encode
from hotplug.server.schemas import MAX_PROMPTS, CompletionBody, check_token_ids
from hotplug.server.service import Service, service_of
from hotplug.server.stream import DONE, EventStream, Output, Usage, answer, collect, event, finite, merge
from hotplug.server.tracing import span_of

if TYPE_CHECKING:
    from hotplug.core.engine.outputs import CompletionChunk
    from hotplug.core.request import SamplingParams, TokenLogprobs
    from hotplug.core.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16

router = APIRouter()


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]
    text: str
    """What `echo` returns; empty without it."""


@router.post("/v1/completions", response_model=None)
async def create_completion(request: Request, body: CompletionBody) -> Response:
    """Continue one prompt or several, as one object or as a stream of events."""
    service = service_of(request)
    service.check_model(body.model)
    prompts = await _prompts(service, body)
    params = _sampling(service, body, prompts)
    span = span_of(request)
    streams = [service.stream(prompt.token_ids, params, body, span) for prompt in prompts]
    if body.max_tokens == 0:
        streams = [_score_only(stream) for stream in streams]
    chunks = streams[0] if len(streams) == 1 else merge(streams, body.count)
    usage = Usage(sum(len(prompt.token_ids) for prompt in prompts), body.count)
    labels = await service.labels("cmpl-", "text_completion", span)
    choices = [
        Choice(index, prompts[index // body.count], body, service.tokenizer)
        for index in range(len(prompts) * body.count)
    ]
    if body.stream:
        return EventStream(chunks, CompletionEvents(labels, usage, choices, body.include_usage))

    async def complete() -> dict[str, Any]:
        outputs = await collect(chunks, len(choices), usage)
        prompt_logprobs = [outputs[i - i % body.count].prompt_logprobs for i in range(len(outputs))]
        rendered = map(Choice.whole, choices, outputs, prompt_logprobs)
        return {**labels, "choices": list(rendered), "usage": usage.as_dict()}

    return await answer(request.receive, complete())


async def _prompts(service: Service, body: CompletionBody) -> list[Prompt]:
    """The prompts as token ids, each checked for its length. Raises RequestError."""
    given: Sequence[Any] = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not 0 < len(given) <= MAX_PROMPTS:
        raise RequestError(f"prompt must hold 1 to {MAX_PROMPTS} prompts, got {len(given)}", param="prompt")
    if isinstance(given[0], str):
        texts = given
        token_ids = await service.encode(texts, add_special_tokens=body.add_special_tokens)
    else:
        token_ids = [check_token_ids(one, service.llm.vocab_size, "prompt") for one in given]
        skip = body.skip_special_tokens is not False
        texts = [service.tokenizer.decode(one, skip) if body.echo else "" for one in token_ids]
    for one in token_ids:
        service.check_length(one, "prompt")
        service.check_budget(one, body.max_tokens, "max_tokens")
    return [Prompt(one, text if body.echo else "") for one, text in zip(token_ids, texts, strict=True)]


def _sampling(service: Service, body: CompletionBody, prompts: list[Prompt]) -> SamplingParams:
    max_tokens = body.max_tokens
    if max_tokens is None:
        longest = max(len(prompt.token_ids) for prompt in prompts)
        max_tokens = min(DEFAULT_MAX_TOKENS, service.llm.max_model_len - longest)
    elif max_tokens == 0:
        if not body.echo:
            raise RequestError("max_tokens must be at least 1 without echo, got 0", param="max_tokens")
        max_tokens = 1  # the engine computes a prompt's log-probabilities on the way to a first token
    scores = body.logprobs if body.echo else None
    if scores is not None and body.stream and body.count > 1:
        raise RequestError("stream with echo, logprobs and n above 1 is not supported", param="stream")
    return body.sampling(service.llm.vocab_size, max_tokens=max_tokens, logprobs=body.logprobs, prompt_logprobs=scores)


async def _score_only(
    stream: AsyncGenerator[CompletionChunk, None],
) -> AsyncGenerator[CompletionChunk, None]:
    """The chunks of a request for no output: what they say of the prompt stays, the token goes."""
    async with aclosing(stream):
        async for chunk in stream:
            reason = chunk.finish_reason and ("length" if chunk.finish_reason == "stop" else chunk.finish_reason)
            yield dataclasses.replace(
                chunk, text="", token_ids=[], logprobs=None, finish_reason=reason, stop_reason=None
            )


class Choice:
    """Renders one choice of the answer, in one piece or chunk by chunk."""

    def __init__(self, index: int, prompt: Prompt, body: CompletionBody, tokenizer: Tokenizer) -> None:
        self.index = index
        self.opened = not body.echo
        self._prompt = prompt
        self._k = body.logprobs
        self._tokenizer = tokenizer
        self._offset = 0

    def whole(self, output: Output, prompt_logprobs: list[TokenLogprobs | None] | None) -> dict[str, Any]:
        positions = [*(prompt_logprobs or ()), *output.logprobs]
        return self._render(self._prompt.text + output.text, positions, output)

    def part(self, chunk: CompletionChunk) -> dict[str, Any] | None:
        """One streamed piece; None when there is nothing to show yet. The first one echoes the prompt."""
        text = chunk.text
        positions: list[TokenLogprobs | None] = [*(chunk.logprobs or ())]
        if not self.opened:
            self.opened = True
            text = self._prompt.text + text
            positions = [*(chunk.prompt_logprobs or ()), *positions]
        if not (text or positions or chunk.finish_reason):
            return None
        return self._render(text, positions, chunk)

    def _render(
        self, text: str, positions: list[TokenLogprobs | None], end: Output | CompletionChunk
    ) -> dict[str, Any]:
        return {
            "index": self.index,
            "text": text,
            "logprobs": None if self._k is None else self._logprobs(positions),
            "finish_reason": end.finish_reason,
            "stop_reason": end.stop_reason,
        }

    def _logprobs(self, positions: list[TokenLogprobs | None]) -> dict[str, Any]:
        """Log-probabilities in the form of the completions API.

        `text_offset` counts characters from the beginning of this choice's `text`. Only the first prompt
        token has no log-probability, so a None stands for it.
        """
        tokens: list[str] = []
        chosen: list[float | None] = []
        alternatives: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for position in positions:
            token = self._prompt.token_ids[0] if position is None else position.token_ids[0]
            tokens.append(self._tokenizer.token_text(token))
            chosen.append(None if position is None else finite(position.logprobs[0]))
            alternatives.append(None if position is None else self._alternatives(position))
            offsets.append(self._offset)
            self._offset += len(tokens[-1])
        return {
            "tokens": tokens,
            "token_logprobs": chosen,
            "top_logprobs": alternatives if self._k else None,
            "text_offset": offsets,
        }

    def _alternatives(self, position: TokenLogprobs) -> dict[str, float]:
        """The best tokens, best first, and the chosen one; of tokens with equal text the best counts."""
        best: dict[str, float] = {}
        order = [*range(1, len(position.token_ids)), 0]
        for i in order:
            best.setdefault(self._tokenizer.token_text(position.token_ids[i]), finite(position.logprobs[i]))
        return best


class CompletionEvents:
    """Frames the chunks of a completion."""

    def __init__(self, labels: dict[str, Any], usage: Usage, choices: list[Choice], include_usage: bool) -> None:
        self._labels = labels
        self._usage = usage
        self._choices = choices
        self._include_usage = include_usage
        self._head = b"data: " + encode(labels)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._text_tail = b',"logprobs":null,"finish_reason":null,"stop_reason":null}' + self._tail
        self._text_heads = [self._head + b'{"index":%d,"text":' % choice.index for choice in choices]

    def chunk(self, chunk: CompletionChunk) -> bytes:
        self._usage.add(chunk)
        choice = self._choices[chunk.index]
        if choice.opened and chunk.finish_reason is None and not chunk.logprobs:
            if not chunk.text:
                return b""
            return self._text_heads[chunk.index] + encode(chunk.text) + self._text_tail
        part = choice.part(chunk)
        return b"" if part is None else self._head + encode(part) + self._tail

    def end(self) -> bytes:
        if not self._include_usage:
            return DONE
        return event({**self._labels, "choices": [], "usage": self._usage.as_dict()}) + DONE
