"""One small example of each extension of hotplug that is no platform and no model."""

from __future__ import annotations

from typing import Any

from hotplug.plugins import Extension, KVConnector, KVFormat, LogitsProcessor
from hotplug_extras.parsers import ArrowParser, BracketParser
from hotplug_extras.scheduling import ShortestFirst


def plugin() -> Extension:
    from hotplug_extras.quantization import Int8

    return Extension(
        scheduling={"shortest-first": ShortestFirst()},
        logits_processors={"ban": _ban, "no-repeat": _no_repeat},
        tool_parsers={"arrow": ArrowParser},
        reasoning_parsers={"bracket": BracketParser},
        quantization={"int8": Int8()},
        kv_connectors={"folder": _folder},
    )


def _ban(vocab_size: int, **arguments: Any) -> LogitsProcessor:
    from hotplug_extras.processors import Ban

    return Ban(vocab_size, **arguments)


def _no_repeat(vocab_size: int, **arguments: Any) -> LogitsProcessor:
    from hotplug_extras.processors import NoRepeat

    return NoRepeat(vocab_size, **arguments)


def _folder(argument: str, kv_format: KVFormat) -> KVConnector:
    from hotplug_extras.connector import FolderConnector

    return FolderConnector(argument, kv_format)
