"""Text to token ids and back, and conversations to prompts: one class over the `tokenizers` library.

Streaming is the detokenizer's business, reading files that of `tokenizer_files`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import tokenizers

from hotplug.core.errors import RequestError
from hotplug.core.text import template as chat_templates
from hotplug.core.text.token_bytes import BYTE_TOKENS, byte_level_bytes, with_valid_bytes
from hotplug.core.text.user_text import UserText, encodable

_LONG_TEXT = 10_000
"""Characters from which a text is encoded without Python's lock, at some microseconds more."""
_MAX_TEMPLATES = 32
_SENTENCEPIECE = ["Replace", "ByteFallback", "Fuse"]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
"""The last step of SentencePiece's decoder where its normalizer prepends a space."""


class Tokenizer:
    """A checkpoint's tokenizer and chat templates.

    `special_tokens` maps roles (bos_token, eos_token, ...) to token texts, as templates see them.
    `templates` maps names to Jinja sources; "default" serves unless tools are given and "tool_use" exists.
    `chat_special_tokens`: special tokens that are spelled in messages are tokens, not text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str],
        eos_token_ids: tuple[int, ...] = (),
        templates: dict[str, str] | None = None,
        chat_special_tokens: bool = False,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = special_tokens
        self.templates = templates or {}
        self.chat_special_tokens = chat_special_tokens
        self._user_texts: dict[str, UserText] = {}
        eos = backend.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
        own = () if eos is None else (eos,)
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(own + eos_token_ids))

    # --- tokens -----------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in the text are recognised."""
        if len(text) < _LONG_TEXT:
            return self.backend.encode(encodable(text), add_special_tokens=add_special_tokens).ids
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of several texts, in parallel and without Python's lock."""
        batch = self.backend.encode_batch([encodable(t) for t in texts], add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. An id outside the vocabulary adds nothing, invalid UTF-8 becomes U+FFFD."""
        skip = self.special_ids if skip_special_tokens else frozenset[int]()
        if self._own_text:  # the library reads them in GPT-2's alphabet
            return b"".join(self.token_bytes(i) for i in ids if i not in skip).decode(errors="replace")
        text = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        if self.byte_fallback and "\ufffd" in text:  # the library gives up a whole run of byte tokens for one of them
            tokens = [token for i in ids if i not in skip and (token := self.tokens[i]) is not None]
            return str(self.backend.decoder.decode(with_valid_bytes(tokens)))
        return text

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself; half a character shows as U+FFFD. "" outside the vocabulary."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes one token adds to the text, a leading space included."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.byte_level:
            own = self._own_text.get(token_id)
            return byte_level_bytes(token) if own is None else own
        byte = self.fallback_bytes.get(token_id)
        return token.replace("▁", " ").encode() if byte is None else byte

    @cached_property
    def fallback_bytes(self) -> dict[int, bytes]:
        """By id: the bytes that SentencePiece's byte tokens such as <0x0A> stand for."""
        if not self.byte_fallback:
            return {}
        found = ((self.backend.token_to_id(token), byte) for token, byte in BYTE_TOKENS.items())
        return {token_id: byte for token_id, byte in found if token_id is not None}

    @cached_property
    def tokens(self) -> dict[int, str | None]:
        """By id, for every id: the token as the vocabulary spells it, None outside. Filled as tokens are looked up."""
        return _LookedUp(self.backend.id_to_token)

    @cached_property
    def whole_texts(self) -> dict[int, str | None]:
        """By id, for every id: a token's text if its bytes are whole characters by themselves, else None.

        Filled as tokens are looked up.
        """
        return _LookedUp(self._whole_text)

    def _whole_text(self, token_id: int) -> str | None:
        try:
            return self.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            return None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model's logits may have more columns."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        decode = self.backend.decode  # knows of tokens that were special before they were declared again
        return frozenset(
            i for i, token in added.items()
            if token.special or (not decode([i], skip_special_tokens=True) and decode([i], skip_special_tokens=False))
        )  # fmt: skip

    def special_among(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Ids of those of these texts that are special tokens."""
        ids = (self.backend.token_to_id(text) for text in texts)
        return tuple(i for i in ids if i is not None and i in self.special_ids)

    @cached_property
    def byte_level(self) -> bool:
        """Whether tokens are bytes in GPT-2's alphabet."""
        return self._decoder_types in (["ByteLevel"], ["ByteLevel", "Fuse"])

    @cached_property
    def _own_text(self) -> dict[int, bytes]:
        """By id: added tokens of a byte-level tokenizer whose text could be taken for GPT-2's alphabet, as "für"."""
        added = self.backend.get_added_tokens_decoder() if self.byte_level else {}
        return {i: token.content.encode() for i, token in added.items() if not token.content.isascii()}

    @cached_property
    def byte_fallback(self) -> bool:
        """Whether characters outside the vocabulary are spelled in byte tokens."""
        return "ByteFallback" in self._decoder_types

    @cached_property
    def joins_bytes(self) -> bool:
        """Whether decoding is joining `token_bytes`, but for `strips_first_space`."""
        return self.byte_level or (
            self._decoder_types in (_SENTENCEPIECE, [*_SENTENCEPIECE, "Strip"])
            and self._decoder_steps[0].items() >= {"pattern": {"String": "▁"}, "content": " "}.items()
            and (len(self._decoder_steps) == 3 or self._strips)
        )

    @cached_property
    def strips_first_space(self) -> bool:
        """Whether decoding drops a space at the beginning of the text."""
        return self.joins_bytes and self._strips

    @property
    def _strips(self) -> bool:
        return bool(self._decoder_steps) and self._decoder_steps[-1] == _STRIP

    @property
    def _decoder_types(self) -> list[str]:
        return [step["type"] for step in self._decoder_steps]

    @cached_property
    def _decoder_steps(self) -> list[dict[str, Any]]:
        if self.backend.decoder is None:
            return []
        settings = json.loads(self.backend.decoder.__getstate__())
        steps: list[dict[str, Any]] = settings.get("decoders", [settings])
        return steps

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    # --- conversations ----------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """The Jinja source for conversations without tools; None if the checkpoint has none."""
        return self.templates.get("default")

    def template_mentions(self, name: str, *, tools: bool) -> bool:
        """Whether the template for a conversation, with tools or without, has a name in it; true if there is none,
        which rendering tells. What a template never mentions would be lost without a word."""
        source = (self.templates.get("tool_use") if tools else None) or self.chat_template
        return source is None or chat_templates.mentions(source, name)

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        /,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **template_variables: Any,
    ) -> str:
        """The prompt of a conversation; content given in text parts is joined by newlines.

        `template_variables` reach the template as they are (enable_thinking, documents, ...). Raises
        RequestError: no template, a part that is not text, or messages the template cannot render.
        """
        source = self._template(tools, template)
        variables = {"add_generation_prompt": add_generation_prompt, **template_variables}
        variables = {**self._variables, "tools": list(tools) if tools else None, **variables}
        return chat_templates.render(source, [_text_only(m) for m in messages], variables)

    def encode_chat(self, messages: Sequence[dict[str, Any]], /, **options: Any) -> list[int]:
        """Token ids of `render_chat(messages, **options)`, in which only the template writes control tokens.

        What strings of messages, tools and variables spell like one is encoded as text, unless `chat_special_tokens`.
        """
        if not self.chat_special_tokens:
            template = options.pop("template", None)
            user_text = self.user_text(self._template(options.get("tools"), template))
            marked = user_text.mark(([_text_only(m) for m in messages], options))
            if marked is not None:
                ([*messages], options), letters = marked
                return user_text.encode(self.render_chat(messages, template=template, **options), letters)
            options["template"] = template
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    def user_text(self, template: str) -> UserText:
        """What keeps text of users from being tokens of this template. Raises RequestError if it is none."""
        found = self._user_texts.get(template)
        if found is None:
            seams = chat_templates.looked_for(template)
            turns = chat_templates.plain_turns(template, self._variables)
            control = [
                token.content for i, token in self.backend.get_added_tokens_decoder().items()
                if i in self.special_ids or (_is_mark(token.content) and token.content in turns
                                             and not any(token.content in text for text in seams))
            ]  # fmt: skip
            if len(self._user_texts) >= _MAX_TEMPLATES:
                self._user_texts.clear()
            found = self._user_texts[template] = UserText(self.backend, control, seams)
        return found

    def prepare_chat(self) -> None:
        """Do now what the first conversation would wait for."""
        for source in self.templates.values():
            with suppress(RequestError):  # no template; told to whoever asks for it
                self.user_text(source)

    def _template(self, tools: Any, given: str | None) -> str:
        source = given or (self.templates.get("tool_use") if tools else None) or self.chat_template
        if source is None:
            raise RequestError("the model has no chat template", param="messages",
                               hint="Use the completions API, or start with --chat-template FILE.")  # fmt: skip
        return source

    @property
    def _variables(self) -> dict[str, Any]:
        """What every template sees besides its messages."""
        return {**self.special_tokens, "tools": None, "documents": None, "add_generation_prompt": False}


class _LookedUp(dict[int, "str | None"]):
    """Answers of a function, kept."""

    def __init__(self, look_up: Callable[[int], str | None]) -> None:
        self._look_up = look_up

    def __missing__(self, token_id: int) -> str | None:
        found = self[token_id] = self._look_up(token_id)
        return found


def _is_mark(token: str) -> bool:
    """Whether a token looks like a mark, and not like a word or blanks that a text may well hold."""
    return len(token) > 2 and not token[0].isalnum() and not token[0].isspace()


def _text_only(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RequestError(f"a message part of type {kind!r} cannot be used: the model reads text only",
                               param="messages")  # fmt: skip
    return {**message, "content": "\n".join(part["text"] for part in content)}
