"""What requests may say: the bodies of the OpenAI API plus our extensions, checked strictly.

An unknown field is refused with the nearest valid name, a field of the OpenAI API that is not built is
refused by its name unless it holds the value that means "off", and a few fields that cannot change an
answer are taken and left alone. null is the default of every field that has one. Lengths are bounded before types are
checked. Responses are built as plain dictionaries where they are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from hotplug.core.errors import RequestError
from hotplug.core.request import (
    MAX_CACHE_SALT_CHARS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from hotplug.core.text.parsers import read_arguments
from hotplug.server.bounds import CHARS, Bound
from hotplug.server.prompts import MAX_COMPLETIONS, Prompts
from hotplug.server.strict import FIRST_FAULT, Body, Refusals

MAX_ENTRIES = 1024
"""Tools, and calls of a message."""
MAX_MESSAGES = 10_000
MAX_PARTS = 10_000
MAX_PLAIN = 1 << 20
"""Characters and values of what reaches a template as it is: tools, template variables, arguments of a call."""

_IGNORED = {
    "user": "identifies the caller for abuse tracking",
    "safety_identifier": "the same under its newer name",
    "metadata": "labels for stored completions, and nothing is stored",
    "parallel_tool_calls": "a hint; calls are taken as the model makes them",
    "prompt_cache_key": "a routing hint; the prefix cache finds equal prefixes by itself",
    "prompt_cache_retention": "a caching hint; it never changes an answer",
}
_REFUSED: Refusals = {
    "store": ((False,), "completions are not stored"),
    "service_tier": (("auto", "default"), "there is one tier; use priority"),
    "suffix": (("",), "insertion is not supported"),
    "functions": (([],), "function calls are not supported"),
    "function_call": (("none", "auto"), "function calls are not supported"),
    "response_format": (({"type": "text"},), "only free text is supported"),
    "modalities": ((["text"],), "only text is supported"),
    "audio": ((), "only text is supported"),
    "prediction": ((), "predicted outputs are not supported"),
    "reasoning_effort": ((), "pass what the chat template knows in chat_template_kwargs"),
    "verbosity": (("medium",), "it is not supported"),
    "web_search_options": ((), "web search is not supported"),
    "moderation": ((), "moderation is not supported"),
    "prompt_cache_options": ((), "it is not supported; see cache_salt"),
}


class StreamOptions(Body):
    prefix = "stream_options."
    refused: ClassVar[Refusals] = {
        "continuous_usage_stats": ((False,), "usage comes once, in the last event"),
        "include_obfuscation": ((False,), "it is not supported"),
    }

    include_usage: bool = False


class GenerationBody(Body):
    """The fields that completions and chat completions share; null means the default."""

    ignored = frozenset(_IGNORED)
    refused = _REFUSED
    bounds: ClassVar[dict[str, Bound]] = {
        "model": CHARS,
        "stop": Bound(MAX_STOP, MAX_STOP_CHARS),
        "stop_token_ids": Bound(MAX_STOP_TOKEN_IDS),
        "logit_bias": Bound(MAX_LOGIT_BIAS),
        "logits_processors": Bound(total=1 << 16),
        "cache_salt": Bound(chars=MAX_CACHE_SALT_CHARS),
    }

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    top_k: int | None = Field(None, description="Extension: sample from the k most likely tokens")
    min_p: float | None = Field(None, description="Extension: least probability relative to the best token")
    repetition_penalty: float | None = Field(None, description="Extension: divides logits of seen tokens")
    min_tokens: int | None = Field(None, description="Extension: no end before this many tokens")
    stop_token_ids: list[int] | None = Field(None, description="Extension: token ids that end the output")
    ignore_eos: bool | None = Field(None, description="Extension: run past the end-of-sequence token")
    logits_processors: dict[str, dict[str, Any]] | None = Field(
        None, description="Extension: processors of installed plugins by name, each with its arguments"
    )
    speculative: bool | None = Field(None, description="Extension: verify several proposed tokens a step, or never")
    skip_special_tokens: bool | None = Field(None, description="Extension: leave special tokens out of text")
    include_stop_str_in_output: bool | None = Field(None, description="Extension: keep the stop string")
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="Extension: lower runs first")
    cache_salt: str = Field("", description="Extension: separates tenants in the prefix cache")

    @property
    def count(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(
        self,
        vocab_size: int,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The engine's form of these fields. Raises RequestError naming the field at fault."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream to be true", param="stream_options")
        given = {name: value for name in _DIRECT if (value := getattr(self, name)) is not None}
        return SamplingParams(
            **given,
            max_tokens=max_tokens,
            stop=self._stop_strings(),
            stop_token_ids=tuple(check_token_ids(self.stop_token_ids or (), vocab_size, "stop_token_ids")),
            logit_bias=self._token_biases(vocab_size),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def _token_biases(self, vocab_size: int) -> dict[int, float] | None:
        biases: dict[int, float] = {}
        for key, bias in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
                raise RequestError(
                    f"logit_bias must be keyed by token ids from 0 to {vocab_size - 1}, got {key[:80]!r}",
                    param="logit_bias",
                )
            biases[int(key)] = bias
        return biases or None


_DIRECT = ("n", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p",
           "repetition_penalty", "min_tokens", "ignore_eos", "skip_special_tokens",
           "include_stop_str_in_output", "logits_processors", "speculative")  # fmt: skip


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None
    add_special_tokens: bool = Field(True, description="Extension: add the tokenizer's special tokens")

    @model_validator(mode="after")
    def _best_of_is_n(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.count:
            raise RequestError(
                f"best_of is refused unless it equals n ({self.count}), got {self.best_of}", param="best_of"
            )
        return self

    @model_validator(mode="after")
    def _bounded(self) -> CompletionBody:
        if len(self.prompt) > 1 and len(self.prompt) * self.count > MAX_COMPLETIONS:
            raise RequestError(f"prompts times n must be at most {MAX_COMPLETIONS}, got {len(self.prompt)} times "
                               f"{self.count}", param="n", hint="Send several requests.")  # fmt: skip
        return self


class TextPart(Body):
    prefix = "messages.content."

    type: str
    text: str

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(kind := data.get("type"), str) and kind != "text":
            raise RequestError(f"content of type {kind[:80]!r} is refused: only text is supported", param="messages")
        return data


class FunctionOfCall(Body):
    prefix = "messages.tool_calls.function."
    bounds: ClassVar[dict[str, Bound]] = {"name": CHARS, "arguments": Bound(chars=MAX_PLAIN)}

    name: str
    arguments: str


class CallOfMessage(Body):
    """A call that the model made earlier, as this API answered it."""

    prefix = "messages.tool_calls."
    ignored = frozenset({"index"})
    bounds: ClassVar[dict[str, Bound]] = {"id": CHARS}

    id: str
    type: Literal["function"] = "function"
    function: FunctionOfCall

    def for_template(self) -> dict[str, Any]:
        """Templates write the arguments as JSON themselves, so they get the object."""
        arguments = read_arguments(self.function.arguments)
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class FunctionOfTool(Body):
    prefix = "tools.function."
    bounds: ClassVar[dict[str, Bound]] = {"name": CHARS}

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="Refused when true: answers are not constrained to the schema")

    @model_validator(mode="after")
    def _not_strict(self) -> FunctionOfTool:
        if self.strict:
            raise RequestError("tools.function.strict is refused: answers are not constrained to a schema",
                               param="tools")  # fmt: skip
        return self


class Tool(Body):
    """A function that the model may ask to be called."""

    prefix = "tools."

    type: Literal["function"]
    function: FunctionOfTool

    def for_template(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


class Message(Body):
    """One turn; also takes back the assistant messages that this API answers with."""

    prefix = "messages."
    ignored = frozenset({"annotations", "refusal"})
    bounds: ClassVar[dict[str, Bound]] = {
        "content": Bound(MAX_PARTS),
        "name": CHARS,
        "tool_call_id": CHARS,
        "tool_calls": Bound(MAX_ENTRIES),
    }
    refused: ClassVar[Refusals] = {
        "function_call": ((), "function calls are not supported"),
        "audio": ((), "only text is supported"),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], FIRST_FAULT] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[CallOfMessage], FIRST_FAULT] | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise RequestError(f"a message of role {self.role} needs content", param="messages")
        return self

    @property
    def texts(self) -> list[str]:
        """What it says, in parts."""
        content = self.content or ""
        return [content] if isinstance(content, str) else [part.text for part in content]

    def for_template(self) -> dict[str, Any]:
        """The message as a chat template reads it.

        Templates know no developer role (the newer name of system), and most want text and not parts.
        """
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": "\n".join(self.texts)}
        for field in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, field)) is not None:
                message[field] = value
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


_CONVERSATION = {
    "messages": Bound(MAX_MESSAGES),
    "tools": Bound(MAX_ENTRIES, total=MAX_PLAIN),
    "chat_template_kwargs": Bound(total=MAX_PLAIN),
}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    bounds: ClassVar[dict[str, Bound]] = {**GenerationBody.bounds, **_CONVERSATION}

    messages: Annotated[list[Message], FIRST_FAULT] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[Tool], FIRST_FAULT] | None = None
    tool_choice: str | dict[str, Any] | None = None
    add_generation_prompt: bool = Field(True, description="Extension: open the assistant's turn")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Extension: template variables")

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that this answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        check_calls(self.messages)
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        if self.tool_choice not in (None, "none", "auto"):
            raise RequestError("tool_choice is refused unless none or auto: calls are not forced", param="tool_choice",
                               hint="Leave it out and ask for the call in the prompt.")  # fmt: skip
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise RequestError("max_tokens and max_completion_tokens differ", param="max_completion_tokens")
        return self


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or messages through the chat template."""

    bounds: ClassVar[dict[str, Bound]] = {"model": CHARS, **_CONVERSATION}

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], FIRST_FAULT] | None = Field(None, min_length=1)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_input(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        check_calls(self.messages or ())
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    bounds: ClassVar[dict[str, Bound]] = {"model": CHARS}

    model: str | None = None
    tokens: Annotated[list[int], FIRST_FAULT]
    skip_special_tokens: bool = False


BODIES = (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody)
"""What the routes take."""


def check_calls(messages: Sequence[Message]) -> None:
    """Raises RequestError for the result of a call that the assistant's message before it does not make.

    As the OpenAI API has it: messages of role tool follow such a message, and name one of its calls each.
    """
    calls: set[str] = set()
    for i, message in enumerate(messages):
        if message.role != "tool":
            calls = {call.id for call in message.tool_calls or ()} if message.role == "assistant" else set()
            continue
        at = f"messages[{i}]"
        if message.tool_call_id is None:
            raise RequestError(f"{at} has role tool and needs a tool_call_id", param=f"{at}.tool_call_id")
        if not calls:
            raise RequestError(f"{at} has role tool and no assistant message with tool_calls before it",
                               param=f"{at}.role")  # fmt: skip
        if message.tool_call_id not in calls:
            raise RequestError(f"{at}.tool_call_id {message.tool_call_id[:80]!r} is no call of the assistant message "
                               "before it", param=f"{at}.tool_call_id")  # fmt: skip


def check_token_ids(ids: Any, vocab_size: int, param: str) -> Any:
    """`ids` itself when every id is in the vocabulary. Raises RequestError."""
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise RequestError(f"{param} must hold token ids from 0 to {vocab_size - 1}, got {wrong}", param=param)
    return ids
