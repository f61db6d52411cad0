"""POST /v1/completions: text or token ids in, text out; also scores prompts (echo with logprobs)."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hotplug.core.errors import RequestError
from hotplug.server.body import encode
from hotplug.server.intake import BodyRoute, beside, body_of, documented
from hotplug.server.offsets import Offsets, name, offsets_in
from hotplug.server.offsets import alternatives as named
from hotplug.server.schemas import CompletionBody, check_token_ids
from hotplug.server.service import Service, service_of
from hotplug.server.stream import DONE, EventStream, Output, Usage, answer, collect, event, finite, merge
from hotplug.server.tracing import span_of

if TYPE_CHECKING:
    from hotplug.core.client.outputs import CompletionChunk
    from hotplug.core.logprobs import TokenLogprobs
    from hotplug.core.request import SamplingParams
    from hotplug.core.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16

MAX_ECHO = 1 << 24
"""Characters of prompts that one answer repeats."""
SCORE_SIZE = 64
"""Bytes of a body that cost as much as the log-probabilities of one token of a prompt."""
_CONTEXT = 64
"""Tokens of a prompt that its output's text may depend on, and more."""

router = APIRouter(route_class=BodyRoute)


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]
    text: str
    """What `echo` returns; empty without it."""
    offsets: Sequence[int] = ()
    """Where in it each token begins, if that is asked for."""


@router.post("/v1/completions", response_model=None, openapi_extra=documented(CompletionBody))
async def create_completion(request: Request) -> Response:
    """Continue one prompt or several, as one object or as a stream of events."""
    body = await body_of(CompletionBody, request)
    service = service_of(request)
    service.check_model(body.model)
    prompts = await beside(body.size, lambda: _prompts(service, body))
    params = _sampling(service, body, prompts)
    span = span_of(request)

    def start(prompt: Prompt) -> AsyncGenerator[CompletionChunk, None]:
        stream = service.stream(prompt.token_ids, params, body, span)
        return _score_only(stream) if body.max_tokens == 0 else stream

    chunks = start(prompts[0]) if len(prompts) == 1 else merge([partial(start, one) for one in prompts], body.count)
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
        of_prompts = [output.prompt_logprobs for output in outputs[:: body.count]]
        scored = 0 if of_prompts[0] is None else usage.prompt_tokens * body.count * SCORE_SIZE

        def rendered() -> list[dict[str, Any]]:
            scores = [list(one or ()) for one in of_prompts]
            return [choice.whole(outputs[i], scores[i // body.count]) for i, choice in enumerate(choices)]

        return {**labels, "choices": await beside(scored, rendered), "usage": usage.as_dict()}

    return await answer(request.receive, complete())


def _prompts(service: Service, body: CompletionBody) -> list[Prompt]:
    """The prompts as token ids, each checked for its length. Raises RequestError."""
    texts = [one for one in body.prompt if isinstance(one, str)]
    token_ids = [one for one in body.prompt if not isinstance(one, str)]
    if texts:
        token_ids = service.encode(texts, add_special_tokens=body.add_special_tokens)
    for one in token_ids:
        service.check_length(one, "prompt")
        service.check_budget(one, body.max_tokens, "max_tokens")
        check_token_ids(one, service.llm.vocab_size, "prompt")
    if not body.echo:
        return [Prompt(one, "") for one in token_ids]
    skip = body.skip_special_tokens is not False
    echoed = texts or [service.tokenizer.decode(one, skip) for one in token_ids]
    if (size := sum(map(len, echoed)) * body.count) > MAX_ECHO:
        raise RequestError(f"echo would repeat {size} characters, more than {MAX_ECHO}", param="echo",
                           hint="Lower n, or leave echo out.")  # fmt: skip
    prompts = [Prompt(one, text) for one, text in zip(token_ids, echoed, strict=True)]
    if body.logprobs is not None:
        prompts = [dataclasses.replace(one, offsets=_offsets(service.tokenizer, one, bool(texts), skip))
                   for one in prompts]  # fmt: skip
    return prompts


def _offsets(tokenizer: Tokenizer, prompt: Prompt, is_text: bool, skip_special_tokens: bool) -> list[int]:
    """Where in the echo each token of a prompt begins."""
    if is_text:
        return offsets_in(prompt.text, prompt.token_ids, tokenizer)
    counted = Offsets(tokenizer, 0, skip_special_tokens=skip_special_tokens)
    return [min(counted.of(token), len(prompt.text)) for token in prompt.token_ids]


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
        self._length = 0
        """Characters of its text so far."""
        if body.logprobs is not None:
            skip = body.skip_special_tokens is not False
            self._offsets = Offsets(
                tokenizer, len(prompt.text), skip_special_tokens=skip, prompt_ids=prompt.token_ids[-_CONTEXT:]
            )

    def whole(self, output: Output, prompt_logprobs: list[TokenLogprobs | None]) -> dict[str, Any]:
        positions = [*prompt_logprobs, *output.logprobs]
        return self._render(self._prompt.text + output.text, positions, output, len(prompt_logprobs))

    def part(self, chunk: CompletionChunk) -> dict[str, Any]:
        """One streamed piece. The first one echoes the prompt."""
        text = chunk.text
        positions: list[TokenLogprobs | None] = [*(chunk.logprobs or ())]
        of_prompt = 0
        if not self.opened:
            self.opened = True
            text = self._prompt.text + text
            if chunk.prompt_logprobs is not None:
                of_prompt = len(chunk.prompt_logprobs)
                positions = [*chunk.prompt_logprobs, *positions]
        return self._render(text, positions, chunk, of_prompt)

    def _render(
        self, text: str, positions: list[TokenLogprobs | None], end: Output | CompletionChunk, of_prompt: int
    ) -> dict[str, Any]:
        """`of_prompt` of the positions are those of the prompt."""
        self._length += len(text)
        logprobs = None if self._k is None else self._logprobs(positions, of_prompt)
        if logprobs is not None and end.finish_reason is not None:  # what a stop string cut off has no place
            logprobs["text_offset"] = [min(at, self._length) for at in logprobs["text_offset"]]
        return {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": end.finish_reason,
            "stop_reason": end.stop_reason,
        }

    def _logprobs(self, positions: list[TokenLogprobs | None], of_prompt: int) -> dict[str, Any]:
        """Log-probabilities in the form of the completions API.

        `text_offset` counts characters from the beginning of this choice's `text`, over all its pieces. Only the
        first prompt token has no log-probability, so a None stands for it.
        """
        tokens: list[str] = []
        chosen: list[float | None] = []
        alternatives: list[dict[str, float] | None] = []
        offsets: list[int] = [*self._prompt.offsets[:of_prompt]]
        for place, position in enumerate(positions):
            token = self._prompt.token_ids[0] if position is None else position.token_ids[0]
            tokens.append(name(self._tokenizer, token))
            chosen.append(None if position is None else finite(position.logprobs[0]))
            alternatives.append(None if position is None else named(self._tokenizer, position))
            if place >= of_prompt:
                offsets.append(self._offsets.of(token))
        return {
            "tokens": tokens,
            "token_logprobs": chosen,
            "top_logprobs": alternatives if self._k else None,
            "text_offset": offsets,
        }


class CompletionEvents:
    """Frames the chunks of a completion. Tokens that make no character yet are an event too, with an empty text."""

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
            return self._text_heads[chunk.index] + encode(chunk.text) + self._text_tail
        return self._head + encode(choice.part(chunk)) + self._tail

    def end(self) -> bytes:
        if not self._include_usage:
            return DONE
        return event({**self._labels, "choices": [], "usage": self._usage.as_dict()}) + DONE
