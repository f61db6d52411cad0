"""Text to token ids and back, and conversations to prompts: one class over the `tokenizers` library.

Streaming is the detokenizer's business. transformers is imported only for a folder that holds nothing but
files of its slow tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from hotplug.core.errors import ConfigError, ModelError, RequestError, WeightsError
from hotplug.core.text import template as chat_templates
from hotplug.core.weights.metadata import Metadata, brief, open_regular, read_json, read_text

_SLOW_FILES = ("tokenizer.model", "vocab.json", "spiece.model")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer and chat templates.

    `special_tokens` maps roles (bos_token, eos_token, ...) to token texts, as templates see them.
    `templates` maps names to Jinja sources; "default" serves unless tools are given and "tool_use" exists.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str],
        eos_token_ids: tuple[int, ...] = (),
        templates: dict[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = special_tokens
        self.templates = templates or {}
        eos = backend.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
        own = () if eos is None else (eos,)
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(own + eos_token_ids))

    # --- tokens -----------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in the text are recognised."""
        return self.backend.encode(_valid(text), add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of several texts, in parallel."""
        batch = self.backend.encode_batch([_valid(t) for t in texts], add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. An id outside the vocabulary adds nothing, invalid UTF-8 becomes U+FFFD."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself; half a character shows as U+FFFD. "" outside the vocabulary."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes one token adds to the text, a leading space included."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.byte_level:
            return byte_level_bytes(token)
        byte = self.fallback_byte(token_id)
        return token.replace("▁", " ").encode() if byte is None else bytes([byte])

    def fallback_byte(self, token_id: int) -> int | None:
        """The byte that a SentencePiece byte token such as <0x0A> stands for; None for any other token."""
        if not self.byte_fallback:
            return None
        token = self.backend.id_to_token(token_id) or ""
        if len(token) != 6 or not token.startswith("<0x") or token[5] != ">":
            return None
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None

    @cached_property
    def whole_texts(self) -> dict[int, str | None]:
        """By id, for every id: a token's text if its bytes are whole characters by themselves, else None.

        Filled as tokens are looked up.
        """
        return _WholeTexts(self)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model's logits may have more columns."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    @cached_property
    def byte_level(self) -> bool:
        """Whether tokens are bytes in GPT-2's alphabet, so that decoding is joining bytes."""
        return self._decoder_steps == ["ByteLevel"]

    @cached_property
    def byte_fallback(self) -> bool:
        """Whether characters outside the vocabulary are spelled in byte tokens."""
        return "ByteFallback" in self._decoder_steps

    @cached_property
    def _decoder_steps(self) -> list[str]:
        if self.backend.decoder is None:
            return []
        settings = json.loads(self.backend.decoder.__getstate__())
        return [step["type"] for step in settings.get("decoders", [settings])]

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

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
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
        source = template or (self.templates.get("tool_use") if tools else None) or self.chat_template
        if source is None:
            raise RequestError("the model has no chat template", param="messages",
                               hint="Use the completions API, or start with --chat-template FILE.")  # fmt: skip
        variables = {
            **self.special_tokens,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **template_variables,
        }
        return chat_templates.render(source, [_text_only(m) for m in messages], variables)

    def encode_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """Token ids of `render_chat(messages, **options)`; the template writes the special tokens itself."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)


class _WholeTexts(dict[int, "str | None"]):
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str | None:
        try:
            text = self._tokenizer.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text


def load_tokenizer(path: Path, chat_template_file: Path | None = None) -> Tokenizer:
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
    return tokenizer


def _load(path: Path) -> Tokenizer:
    from hotplug.core.weights.checkpoint import find_gguf

    if path.is_dir() and (path / "tokenizer.json").exists():
        return _from_folder(path, _load_backend(path / "tokenizer.json"))
    if path.is_dir() and any((path / name).exists() for name in _SLOW_FILES):
        return _from_folder(path, _convert_slow(path))
    if (gguf_file := find_gguf(path)) is not None:
        return _from_gguf(gguf_file)
    raise ModelError("no tokenizer is there", where=str(path), why="neither tokenizer.json nor a GGUF file")


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a token in GPT-2's alphabet; a token with any other character stands for itself."""
    try:
        return bytes(_BYTES[c] for c in token)
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_alphabet()


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


def _from_folder(folder: Path, backend: tokenizers.Tokenizer) -> Tokenizer:
    config = _settings(folder / "tokenizer_config.json")
    special: dict[str, str] = {}
    for settings in (_settings(folder / "special_tokens_map.json"), config):
        for role in _SPECIAL:
            nested = settings.is_section(role)
            text = settings.section(role).text("content", None) if nested else settings.text(role, None)
            if text is not None:
                special[role] = text
    return Tokenizer(backend, special_tokens=special, templates=_templates(folder, config))


def _templates(folder: Path, config: Metadata) -> dict[str, str]:
    """Templates by name: files of their own win over tokenizer_config.json's string or list of named ones."""
    if config.is_list("chat_template"):
        templates = {entry.text("name"): entry.text("template") for entry in config.sections("chat_template")}
    else:
        text = config.text("chat_template", None)
        templates = {} if text is None else {"default": text}
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


def _settings(file: Path) -> Metadata:
    """What a tokenizer's file beside tokenizer.json says; nothing where there is none."""
    return read_json(file) if file.exists() else Metadata({}, str(file))


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


def _valid(text: str) -> str:
    """Text without lone surrogates, which JSON can carry and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
