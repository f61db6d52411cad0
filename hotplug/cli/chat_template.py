"""Whether a model can chat, read from its files alone: no tokenizer is loaded for it."""

from __future__ import annotations

import json
from pathlib import Path


def has_chat_template(path: Path, override: str | None) -> bool:
    """Whether the checkpoint at `path` has a chat template, or `--chat-template` gives one."""
    from hotplug.core.weights.checkpoint import find_gguf
    from hotplug.core.weights.gguf_file import GgufFile

    if override is not None:
        return True
    if path.is_dir() and (path / "tokenizer_config.json").exists():
        files = [path / "chat_template.jinja", *(path / "additional_chat_templates").glob("*.jinja")]
        return any(file.exists() for file in files) or bool(_settings(path).get("chat_template"))
    file = find_gguf(path)
    return file is not None and GgufFile(file).metadata.present("tokenizer.chat_template")


def _settings(folder: Path) -> dict[str, object]:
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return {}  # the tokenizer's own loading says what is wrong with it
    return settings if isinstance(settings, dict) else {}
