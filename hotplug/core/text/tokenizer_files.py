"""The tokenizer of a checkpoint: from a folder's files or a GGUF file.

transformers is imported only for a folder that holds nothing but files of its slow tokenizers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from hotplug.core.errors import ConfigError, ModelError, RequestError, WeightsError
from hotplug.core.text import template as chat_templates
from hotplug.core.text.added_tokens import read_declared
from hotplug.core.text.tokenizer import Tokenizer
from hotplug.core.weights.metadata import brief, open_regular, read_text

_SLOW_FILES = ("tokenizer.model", "vocab.json", "spiece.model")


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
