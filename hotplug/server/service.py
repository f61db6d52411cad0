"""What every endpoint needs of the engine: the served name, tokens within the context, a request's labels.

One `Service` belongs to one app (`app.state.service`). It keeps no state of single requests.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import Request

from hotplug.core.errors import PromptTooLongError, RequestError, UnknownModelError
from hotplug.server.parsing import ChoiceParser, Parsers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from hotplug.core.engine.async_llm import AsyncLLM
    from hotplug.core.engine.outputs import CompletionChunk
    from hotplug.core.request import SamplingParams
    from hotplug.core.text.tokenizer import Tokenizer
    from hotplug.server.schemas import GenerationBody, Message, Tool
    from hotplug.server.tracing import RequestSpan

_LONG_TEXT = 20_000
"""Characters from which tokenizing (over 1 ms) is done beside the event loop."""
_TEMPLATE_ARGUMENTS = frozenset({"messages", "tools", "template", "add_generation_prompt"})


class Service:
    """The engine as the endpoints see it."""

    def __init__(self, llm: AsyncLLM, parsers: Parsers | None = None) -> None:
        self.llm = llm
        self.parsers = parsers or Parsers()
        self.created = int(time.time())

    @property
    def model_name(self) -> str:
        return self.llm.config.model_name

    @property
    def tokenizer(self) -> Tokenizer:
        return self.llm.tokenizer

    def check_model(self, name: str) -> None:
        """Raises UnknownModelError unless `name` is the served model."""
        if name != self.model_name:
            raise UnknownModelError(
                f"the model {name!r} is not served here", param="model", hint=f"Served: {self.model_name!r}."
            )

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        if sum(map(len, texts)) < _LONG_TEXT:
            return [self.tokenizer.encode(text, add_special_tokens) for text in texts]
        return await asyncio.to_thread(self.tokenizer.encode_batch, texts, add_special_tokens)

    async def encode_chat(
        self,
        messages: list[Message],
        *,
        add_generation_prompt: bool,
        variables: dict[str, Any] | None,
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """Token ids of a conversation through the chat template. Raises RequestError."""
        if tools and self.parsers.tool is None:
            raise RequestError("tools are refused: this server takes no tool calls out of answers", param="tools",
                               hint="Start it with --tool-parser.")  # fmt: skip
        for name in variables or ():
            if name in _TEMPLATE_ARGUMENTS:
                raise RequestError(f"chat_template_kwargs may not set {name}", param="chat_template_kwargs")
        plain = [message.for_template() for message in messages]
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, **(variables or {})}
        if tools:
            options["tools"] = [tool.for_template() for tool in tools]

        def encode() -> list[int]:
            return self.tokenizer.encode_chat(plain, **options)

        if sum(len(message["content"]) for message in plain) < _LONG_TEXT:
            return encode()
        return await asyncio.to_thread(encode)

    def choice_parsers(self, prompt: list[int], count: int, *, tools: bool) -> list[ChoiceParser] | None:
        """A parser for each of `count` completions; None where their text is all content."""
        prompt_end = "".join(self.tokenizer.token_text(token) for token in prompt[-8:])
        made = [self.parsers.choice(prompt_end, tools=tools) for _ in range(count)]
        return [parser for parser in made if parser is not None] or None

    def for_parsers(self, params: SamplingParams, *, tools: bool) -> SamplingParams:
        """The parameters under which the text of an answer holds what the parsers look for."""
        tags = self.parsers.tags(tools=tools)
        kept = self.tokenizer.special_among(tags) if tags else ()
        return msgspec.structs.replace(params, keep_special_tokens=kept) if kept else params

    def check_length(self, prompt: list[int], param: str) -> None:
        """Raises RequestError for an empty prompt and PromptTooLongError for one that leaves no room."""
        if not prompt:
            raise RequestError(f"{param} has no tokens", param=param)
        if len(prompt) >= self.llm.max_model_len:
            raise PromptTooLongError(
                f"{param} has {len(prompt)} tokens and the model's context, output included, is "
                f"{self.llm.max_model_len}",
                param=param,
                hint="Shorten it.",
            )

    def check_budget(self, prompt: list[int], max_tokens: int | None, param: str) -> None:
        """Raises RequestError when prompt and output together pass the context."""
        room = self.llm.max_model_len - len(prompt)
        if max_tokens is not None and max_tokens > room:
            raise RequestError(
                f"{param} is {max_tokens}, but the prompt has {len(prompt)} tokens and the model's context "
                f"is {self.llm.max_model_len}",
                param=param,
                hint=f"Ask for at most {room}.",
            )

    def stream(
        self, prompt: list[int], params: SamplingParams, body: GenerationBody, span: RequestSpan | None
    ) -> AsyncGenerator[CompletionChunk, None]:
        chunks = self.llm.stream(prompt, params, priority=body.priority, cache_salt=body.cache_salt)
        if span is None:
            return chunks
        span.asked(body.model, params, stream=bool(body.stream))
        return span.follow(chunks, len(prompt))

    async def labels(self, prefix: str, kind: str, span: RequestSpan | None) -> dict[str, Any]:
        """The fields that open every object of one answer."""
        response_id = prefix + uuid.uuid4().hex
        if span is not None:
            span.named(response_id)
        return {
            "id": response_id,
            "object": kind,
            "created": int(time.time()),
            "model": self.model_name,
            "system_fingerprint": self.llm.plan_hash[:12],
        }


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
