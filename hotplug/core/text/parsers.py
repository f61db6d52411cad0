"""Parsers of generated text: reasoning set apart from the answer, and tool calls taken out of it.

A parser is fed a completion's text piece by piece, as it is generated, and keeps back no more than it must to decide.
Both kinds are plugins' business as well (`hotplug.plugins.extension`). Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol


@dataclass(slots=True)
class ToolCall:
    """A call that the model asks for."""

    name: str
    arguments: str
    """JSON text, as the model wrote it."""


@dataclass(slots=True)
class Reasoned:
    """New text, told apart."""

    reasoning: str = ""
    content: str = ""


@dataclass(slots=True)
class ToolText:
    """New text, with whole calls taken out."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class ReasoningParser(Protocol):
    """Made once a completion, with the end of its prompt: a template may have opened the reasoning already."""

    def push(self, text: str) -> Reasoned:
        """What `text`, the next piece, adds."""
        ...

    def finish(self) -> Reasoned:
        """What was kept back, once the completion has ended."""
        ...


class ToolParser(Protocol):
    """Made once a completion."""

    def push(self, text: str) -> ToolText:
        """What `text`, the next piece, adds."""
        ...

    def finish(self) -> ToolText:
        """What was kept back, once the completion has ended; an unfinished call is text."""
        ...


class TagSplitter:
    """Tells text outside a pair of tags from text inside, piece by piece; the tags go to neither."""

    def __init__(self, start: str, end: str, *, inside: bool = False) -> None:
        self._tags = (start, end)
        self.inside = inside
        self._held = ""

    def push(self, text: str) -> list[tuple[bool, str]]:
        """(inside, text) in order; a change of side is an entry even if its text is empty."""
        self._held += text
        found: list[tuple[bool, str]] = []
        while True:
            before, tag, after = self._held.partition(self._tags[self.inside])
            if not tag:
                break
            found.append((self.inside, before))
            self.inside, self._held = not self.inside, after
            found.append((self.inside, ""))
        keep = _overlap(self._held, self._tags[self.inside])
        cut = len(self._held) - keep
        if cut:
            found.append((self.inside, self._held[:cut]))
            self._held = self._held[cut:]
        return found

    def finish(self) -> list[tuple[bool, str]]:
        """What was kept back for fear of a tag."""
        held, self._held = self._held, ""
        return [(self.inside, held)] if held else []


class ThinkParser:
    """`<think>` ... `</think>`, as DeepSeek-R1, Qwen3 and others write it."""

    def __init__(self, prompt_end: str = "") -> None:
        opened = prompt_end.rstrip().endswith("<think>")
        self._splitter = TagSplitter("<think>", "</think>", inside=opened)
        self._blank = True

    def push(self, text: str) -> Reasoned:
        return self._told_apart(self._splitter.push(text))

    def finish(self) -> Reasoned:
        return self._told_apart(self._splitter.finish())

    def _told_apart(self, parts: list[tuple[bool, str]]) -> Reasoned:
        """Blank space next to the tags belongs to them."""
        found = Reasoned()
        for inside, text in parts:
            if not text:
                self._blank = True
                continue
            text = text.lstrip() if self._blank else text
            self._blank = self._blank and not text
            if inside:
                found.reasoning += text
            else:
                found.content += text
        return found


class HermesParser:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes, Qwen and SmolLM write it."""

    def __init__(self) -> None:
        self._splitter = TagSplitter("<tool_call>", "</tool_call>")
        self._body = ""
        self._blank = False

    def push(self, text: str) -> ToolText:
        found = ToolText()
        for inside, piece in self._splitter.push(text):
            if inside:
                self._body += piece
            elif self._body:  # the closing tag
                self._close(found)
                found.content += self._outside(piece)
            else:
                found.content += self._outside(piece)
        return found

    def finish(self) -> ToolText:
        rest = self._splitter.finish()
        text = "".join(piece for _, piece in rest)
        if self._splitter.inside:
            return ToolText(content=f"<tool_call>{self._body}{text}")
        return ToolText(content=text)

    def _outside(self, text: str) -> str:
        """Blank lines that only part calls from each other are no content."""
        if self._blank:
            text = text.lstrip()
            self._blank = not text
        return text

    def _close(self, found: ToolText) -> None:
        body, self._body = self._body, ""
        call = parse_call(body)
        if call is None:  # not what the model was told to write: the reader may make sense of it
            found.content += f"<tool_call>{body}</tool_call>"
        else:
            found.calls.append(call)
            self._blank = True


def parse_call(text: str) -> ToolCall | None:
    """The call in a JSON object with "name" and "arguments" (or "parameters"); None if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return ToolCall(value["name"], arguments)
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, tag: str) -> int:
    """The longest end of `text` that `tag` starts with."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)


TOOL_PARSERS: Mapping[str, Callable[[], ToolParser]] = MappingProxyType({"hermes": HermesParser})
REASONING_PARSERS: Mapping[str, Callable[[str], ReasoningParser]] = MappingProxyType({"think": ThinkParser})
