"""Text to token ids and back, and conversations to prompts: one class over the `tokenizers` library.

Streaming is the detokenizer's business. transformers is imported only for a folder that holds nothing but
files of its slow tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from hotplug.core.errors import ConfigError, ModelError, RequestError, WeightsError
from hotplug.core.text import template as chat_templates
from hotplug.core.text.added_tokens import read_declared
from hotplug.core.text.token_bytes import BYTE_TOKENS, byte_level_bytes, with_valid_bytes
from hotplug.core.text.user_text import UserText, encodable
from hotplug.core.weights.metadata import brief, open_regular, read_text

_SLOW_FILES = ("tokenizer.model", "vocab.json", "spiece.model")
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


def load_tokenizer(
    path: Path, chat_template_file: Path | None = None, *, chat_special_tokens: bool = False
) -> Tokenizer:
    """The tokenizer of a checkpoint: a folder, or a GGUF file. `chat_template_file` replaces its template.

    Raises ModelError (no tokenizer, malformed files) and ConfigError (the template file).
    """
    override = None if chat_template_file is None else read_template(chat_template_file)
    try:
        tokenizer = _load(path)
    except (OSError, UnicodeDecodeError) as e:
        raise ModelError("cannot read the tokenizer", where=str(path), why=str(e)) from e
    if override is not None:
        tokenizer.templates = {"default": override}
    tokenizer.chat_special_tokens = chat_special_tokens
    if not chat_special_tokens:
        tokenizer.prepare_chat()
    return tokenizer


def _load(path: Path) -> Tokenizer:
    from hotplug.core.weights.checkpoint import find_gguf

    if path.is_dir() and any((path / name).exists() for name in ("tokenizer.json", *_SLOW_FILES)):
        return _from_folder(path)
    if (gguf_file := find_gguf(path)) is not None:
        return _from_gguf(gguf_file)
    raise ModelError("no tokenizer is there", where=str(path), why="neither tokenizer.json nor a GGUF file")


def _from_gguf(file: Path) -> Tokenizer:
    from hotplug.core.text.gguf_tokenizer import build_tokenizer, special_token
    from hotplug.core.weights.gguf_config import end_token_ids
    from hotplug.core.weights.gguf_file import GgufFile

    opened = GgufFile(file)
    backend = build_tokenizer(opened)
    size = len(opened.values["tokenizer.ggml.tokens"])
    roles = (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"))
    special = {}
    for role, key in roles:
        token = special_token(opened, key, size)
        text = None if token is None else backend.id_to_token(token)
        if text is not None:
            special[role] = text
    prefix = "tokenizer.chat_template"
    templates = {
        key.removeprefix(prefix).removeprefix(".") or "default": opened.metadata.text(key)
        for key in opened.metadata.keys()  # noqa: SIM118  (no mapping)
        if key == prefix or key.startswith(prefix + ".")
    }
    ends = end_token_ids(opened, size)
    return Tokenizer(backend, special_tokens=special, eos_token_ids=ends, templates=templates)


def _from_folder(folder: Path) -> Tokenizer:
    declared = read_declared(folder)
    if (folder / "tokenizer.json").exists():
        backend = _load_backend(folder / "tokenizer.json")
        declared.add_to(backend)
    else:
        backend = _convert_slow(folder)
    templates = _templates(folder, declared.config.get("chat_template"))
    return Tokenizer(backend, special_tokens=declared.roles, templates=templates)


def _templates(folder: Path, configured: Any) -> dict[str, str]:
    """Templates by name: files of their own win over tokenizer_config.json's string, object, or list of named ones."""
    if isinstance(configured, str):
        configured = {"default": configured}
    elif isinstance(configured, list) and all(isinstance(entry, dict) for entry in configured):
        configured = {entry.get("name"): entry.get("template") for entry in configured}
    templates = {} if configured is None else configured
    if not isinstance(templates, dict) or not all(isinstance(s, str) for item in templates.items() for s in item):
        raise ModelError("chat_template must be a template or named ones", where=str(folder / "tokenizer_config.json"))
    whole = folder / "chat_template.jinja"
    for file in ([whole] if whole.exists() else []) + sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates["default" if file == whole else file.stem] = read_text(file)
    return templates


def _load_backend(file: Path) -> tokenizers.Tokenizer:
    open_regular(file).close()
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises bare Exception
        raise WeightsError("not a readable tokenizer", where=str(file), why=brief(e)) from e


def _convert_slow(folder: Path) -> tokenizers.Tokenizer:
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(folder)
    except Exception as e:  # whatever the conversion lacks: a file, a package, a known class
        raise ModelError("cannot convert the tokenizer", where=str(folder), why=brief(e),
                         hint="A tokenizer.json beside it avoids the conversion.") from e  # fmt: skip
    backend = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{type(converted).__name__} has no fast form", where=str(folder))
    return backend


def read_template(file: Path) -> str:
    """The chat template in a file. Raises ConfigError for one that cannot be read or compiled."""
    try:
        source = file.read_text(encoding="utf-8")
        chat_templates.compile_template(source)
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError("cannot read the chat template", where=str(file), why=str(e)) from e
    except RequestError as e:
        raise ConfigError(e.what, where=str(file)) from e
    return source


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
