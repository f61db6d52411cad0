"""What every endpoint needs of the engine: the served name, tokens within the context, a request's labels.

One `Service` belongs to one app (`app.state.service`). It keeps no state of single requests.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import Request

from hotplug.core.errors import PromptTooLongError, RequestError, UnknownModelError
from hotplug.server.parsing import ChoiceParser, Parsers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from hotplug.core.client.async_llm import AsyncLLM
    from hotplug.core.client.outputs import CompletionChunk
    from hotplug.core.request import SamplingParams
    from hotplug.core.text.tokenizer import Tokenizer
    from hotplug.server.schemas import GenerationBody, Message, Tool
    from hotplug.server.tracing import RequestSpan

_LONG_TEXT = 20_000
"""Characters from which texts are tokenized in parallel, without the interpreter's lock."""
_TEMPLATE_ARGUMENTS = frozenset({"self", "messages", "tools", "template", "add_generation_prompt"})
_CHARS_A_TOKEN = 8
"""More characters a token of the context than any ordinary text has: what has more is looked at piece by piece."""
_PIECE = 32_000
"""Characters of a piece; where a text is cut changes its number of tokens by a few."""


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
                f"the model {name[:80]!r} is not served here", param="model", hint=f"Served: {self.model_name!r}."
            )

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text. Raises PromptTooLongError for one that is far longer than the context."""
        for text in texts:
            self._check_size((text,), "prompt")
        if sum(map(len, texts)) < _LONG_TEXT:
            return [self.tokenizer.encode(text, add_special_tokens) for text in texts]
        return self.tokenizer.encode_batch(texts, add_special_tokens)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        variables: dict[str, Any] | None,
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """Token ids of a conversation through the chat template. Raises RequestError."""
        self._check_tools(messages, tools)
        for name in variables or ():
            if name in _TEMPLATE_ARGUMENTS:
                raise RequestError(f"chat_template_kwargs may not set {name}", param="chat_template_kwargs")
        if len(messages) > self.llm.max_model_len:  # whose template writes something for each
            raise self._too_long(len(messages), "messages", at_least=True)
        self._check_size([text for message in messages for text in _kept(message)], "messages")
        self._check_size([text for message in messages for text in message.texts], "messages", 2 * _CHARS_A_TOKEN)
        plain = [message.for_template() for message in messages]
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, **(variables or {})}
        if tools:
            options["tools"] = [tool.for_template() for tool in tools]
        return self.tokenizer.encode_chat(plain, **options)

    def _check_tools(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        """Raises RequestError for tools and calls that would get lost on the way to the model, or back."""
        if tools and self.parsers.tool is None:
            raise RequestError("tools are refused: this server takes no tool calls out of answers", param="tools",
                               hint="Start it with --tool-parser.")  # fmt: skip
        if tools and not self.tokenizer.template_mentions("tools", tools=True):
            raise RequestError("tools are refused: the model's chat template does not know them", param="tools",
                               hint="Start the server with a --chat-template that does, or describe them in a message.",
                               )  # fmt: skip
        if any(message.tool_calls for message in messages) and (
            not self.tokenizer.template_mentions("tool_calls", tools=bool(tools))
        ):
            raise RequestError("tool_calls are refused: the model's chat template does not know them", param="messages",
                               hint="Start the server with a --chat-template that does.")  # fmt: skip

    def _check_size(self, texts: Sequence[str], param: str, chars_a_token: int = _CHARS_A_TOKEN) -> None:
        """Raises PromptTooLongError for texts far longer than the context, before anything is made of them.

        Their pieces are tokenized one after the other until they are a quarter over the context. Cutting adds a few
        tokens to a piece of hundreds or more, so no text that fits is refused.
        """
        context = self.llm.max_model_len
        if sum(map(len, texts)) <= chars_a_token * context:
            return
        found = 0
        for text in texts:
            for begin in range(0, len(text), _PIECE):
                found += len(self.tokenizer.encode_batch([text[begin : begin + _PIECE]], False)[0])
                if found > context + context // 4 + 64:
                    raise self._too_long(found, param, at_least=True)

    def _too_long(self, tokens: int, param: str, *, at_least: bool = False) -> PromptTooLongError:
        """In the words of the OpenAI API, by which clients know it."""
        number = f"{'at least ' if at_least else ''}{tokens} tokens"
        return PromptTooLongError(
            f"This model's maximum context length is {self.llm.max_model_len} tokens. However, your {param} resulted "
            f"in {number}, and the output needs one at least",
            param=param,
            hint=f"Please reduce the length of the {param}.",
        )

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
            raise self._too_long(len(prompt), param)

    def check_budget(self, prompt: list[int], max_tokens: int | None, param: str) -> None:
        """Raises PromptTooLongError when prompt and output together pass the context, and RequestError when the output
        alone does."""
        context = self.llm.max_model_len
        room = context - len(prompt)
        if max_tokens is None or max_tokens <= room:
            return
        hint = f"Ask for at most {room}."
        if max_tokens >= context:
            what = f"{param} is {max_tokens}, but prompt ({len(prompt)} tokens) and output share {context} tokens"
            raise RequestError(what, param=param, hint=hint)
        raise PromptTooLongError(
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{len(prompt) + max_tokens} tokens ({len(prompt)} tokens in the prompt, {max_tokens} in the completion)",
            param=param,
            hint=hint,
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


def _kept(message: Message) -> list[str]:
    """The text of a message that every template writes: some leave out earlier reasoning."""
    if message.role != "assistant":
        return message.texts
    return [text.rpartition("</think>")[2] for text in message.texts]


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
