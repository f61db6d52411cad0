"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hotplug.core.errors import RequestError
from hotplug.server.body import encode
from hotplug.server.intake import BodyRoute, beside, body_of, documented
from hotplug.server.parsing import ChoiceParser, render_call
from hotplug.server.schemas import ChatBody
from hotplug.server.service import Service, service_of
from hotplug.server.stream import DONE, EventStream, Output, Usage, answer, collect, event, finite
from hotplug.server.tracing import span_of

if TYPE_CHECKING:
    from hotplug.core.client.outputs import CompletionChunk
    from hotplug.core.logprobs import TokenLogprobs
    from hotplug.core.request import SamplingParams
    from hotplug.core.text.tokenizer import Tokenizer

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/chat/completions", response_model=None, openapi_extra=documented(ChatBody))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, as one object or as a stream of events."""
    body = await body_of(ChatBody, request)
    service = service_of(request)
    service.check_model(body.model)
    encode = partial(
        service.encode_chat,
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        variables=body.chat_template_kwargs,
        tools=body.offered_tools,
    )
    prompt = await beside(body.size, encode)
    service.check_length(prompt, "messages")
    params = service.for_parsers(_sampling(service, body, prompt), tools=bool(body.offered_tools))
    span = span_of(request)
    chunks = service.stream(prompt, params, body, span)
    usage = Usage(len(prompt), body.count)
    parsers = service.choice_parsers(prompt, body.count, tools=bool(body.offered_tools))
    if body.stream:
        labels = await service.labels("chatcmpl-", "chat.completion.chunk", span)
        events = ChatEvents(labels, service.tokenizer, usage, body.count, body.include_usage, parsers)
        return EventStream(chunks, events)
    labels = await service.labels("chatcmpl-", "chat.completion", span)

    async def complete() -> dict[str, Any]:
        outputs = await collect(chunks, body.count, usage)
        wanted = bool(body.logprobs)
        choices = [_choice(i, output, service.tokenizer, wanted, parsers and parsers[i])
                   for i, output in enumerate(outputs)]  # fmt: skip
        return {**labels, "choices": choices, "usage": usage.as_dict()}

    return await answer(request.receive, complete())


def _sampling(service: Service, body: ChatBody, prompt: list[int]) -> SamplingParams:
    limit, param = body.max_tokens, "max_tokens"
    if body.max_completion_tokens is not None:
        limit, param = body.max_completion_tokens, "max_completion_tokens"
    if limit is not None and limit < 1:
        raise RequestError(f"{param} must be at least 1, got {limit}", param=param)
    service.check_budget(prompt, limit, param)
    return body.sampling(
        service.llm.vocab_size,
        max_tokens=limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def _choice(
    index: int, output: Output, tokenizer: Tokenizer, logprobs: bool, parser: ChoiceParser | None
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": output.text, "refusal": None}
    if parser is not None:
        message |= _told_apart(output.text, parser)
    return {
        "index": index,
        "message": message,
        "logprobs": render_logprobs(tokenizer, output.logprobs) if logprobs else None,
        "finish_reason": output.finish_reason if parser is None else parser.finish_reason(output.finish_reason),
        "stop_reason": output.stop_reason,
    }


def _told_apart(text: str, parser: ChoiceParser) -> dict[str, Any]:
    """The fields of a message that a whole text makes."""
    first, last = parser.push(text), parser.finish()
    reasoning, content = first.reasoning + last.reasoning, first.content + last.content
    calls = first.calls + last.calls
    fields: dict[str, Any] = {"content": content if content or not calls else None}
    if reasoning:
        fields["reasoning_content"] = reasoning
    if calls:
        fields["tool_calls"] = [render_call(call) for call in calls]
    return fields


def render_logprobs(tokenizer: Tokenizer, positions: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Log-probabilities in the form of the chat API: one entry a token, alternatives best first."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token),
            "logprob": finite(logprob),
            "bytes": list(tokenizer.token_bytes(token)),
        }

    content = []
    for position in positions:
        chosen, *best = map(entry, position.token_ids, position.logprobs)
        content.append({**chosen, "top_logprobs": best})
    return {"content": content, "refusal": None}


class ChatEvents:
    """Frames the chunks of a chat completion. The first event of each choice carries the role.

    Tokens that make no character yet are an event too, with an empty content, unless the text is told apart.
    """

    def __init__(
        self,
        labels: dict[str, Any],
        tokenizer: Tokenizer,
        usage: Usage,
        count: int,
        include_usage: bool,
        parsers: list[ChoiceParser] | None = None,
    ) -> None:
        self._parsers = parsers
        self._labels = labels
        self._tokenizer = tokenizer
        self._usage = usage
        self._include_usage = include_usage
        self._unopened = set(range(count))
        head = b"data: " + encode(labels)[:-1] + b',"choices":[{"index":'
        self._text_heads = [head + b'%d,"delta":{"content":' % index for index in range(count)]
        self._text_tail = b'},"logprobs":null,"finish_reason":null}]' + self._close()

    def _close(self) -> bytes:
        return b',"usage":null}\n\n' if self._include_usage else b"}\n\n"

    def chunk(self, chunk: CompletionChunk) -> bytes:
        self._usage.add(chunk)
        opening = self._open(chunk.index) if chunk.index in self._unopened else b""
        if self._parsers is not None:
            return opening + self._parsed(chunk, self._parsers[chunk.index])
        if chunk.finish_reason is None and not chunk.logprobs:
            if opening and not chunk.text:
                return opening
            return opening + self._text_heads[chunk.index] + encode(chunk.text) + self._text_tail
        choice = {
            "index": chunk.index,
            "delta": {"content": chunk.text} if chunk.text or chunk.logprobs else {},
            "logprobs": render_logprobs(self._tokenizer, chunk.logprobs) if chunk.logprobs else None,
            "finish_reason": chunk.finish_reason,
        }
        if chunk.finish_reason is not None:
            choice["stop_reason"] = chunk.stop_reason
        return opening + self._event(choice)

    def _parsed(self, chunk: CompletionChunk, parser: ChoiceParser) -> bytes:
        """Events of a chunk whose text is told apart."""
        ended = chunk.finish_reason is not None
        call = parser.num_calls
        parts = [parser.push(chunk.text), *([parser.finish()] if ended else [])]
        deltas: list[dict[str, Any]] = []
        for part in parts:
            if part.reasoning:
                deltas.append({"reasoning_content": part.reasoning})
            if part.content:
                deltas.append({"content": part.content})
            for made in part.calls:
                deltas.append({"tool_calls": [{"index": call, **render_call(made)}]})
                call += 1
        if not deltas and (chunk.logprobs or ended):
            deltas.append({})
        choices = [{"index": chunk.index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas]
        if choices and chunk.logprobs:
            choices[0]["logprobs"] = render_logprobs(self._tokenizer, chunk.logprobs)
        if ended:
            choices[-1]["finish_reason"] = parser.finish_reason(chunk.finish_reason)
            choices[-1]["stop_reason"] = chunk.stop_reason
        return b"".join(map(self._event, choices))

    def _open(self, index: int) -> bytes:
        self._unopened.discard(index)
        delta = {"role": "assistant", "content": ""}
        return self._event({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def _event(self, choice: dict[str, Any]) -> bytes:
        usage = {"usage": None} if self._include_usage else {}
        return event({**self._labels, "choices": [choice], **usage})

    def end(self) -> bytes:
        if not self._include_usage:
            return DONE
        return event({**self._labels, "choices": [], "usage": self._usage.as_dict()}) + DONE
