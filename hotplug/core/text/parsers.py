"""Parsers of generated text: reasoning set apart from the answer, and tool calls taken out of it.

A parser is fed a completion's text piece by piece, as it is generated, and keeps back no more than it must to decide.
How the text is cut into pieces changes nothing. What a parser does not understand stays text: nothing is lost but tags
and the blanks beside them. Both kinds are plugins' business as well (`hotplug.core.extension.points`). Where tags are
special tokens, which text leaves out, a parser names them in an attribute `tags` to see them. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from hotplug.core.text.json_scan import LONE_SURROGATE, ObjectScanner, escape_lone_surrogates, unquote


@dataclass(slots=True)
class ToolCall:
    """A call that the model asks for."""

    name: str
    arguments: str
    """JSON text, as the model wrote it; "{}" for none."""


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
    """`<think>` ... `</think>` before the answer, as DeepSeek-R1, Qwen3 and others write it.

    Once the answer has begun, a tag is part of it.
    """

    tags = ("<think>", "</think>")

    def __init__(self, prompt_end: str = "") -> None:
        self._inside = prompt_end.rstrip().endswith("<think>")
        self._answering = False
        self._held = ""
        self._blank = True
        """Whether only blanks came since the last tag: blanks beside a tag belong to it."""
        self._blanks: list[str] = []
        """Blanks at the start, which belong to an answer without tags."""
        self._tagged = self._inside

    def push(self, text: str) -> Reasoned:
        if self._answering:
            return Reasoned(content=text)
        found = Reasoned()
        self._held += text
        while not self._answering and self._step(found):
            pass
        return found

    def finish(self) -> Reasoned:
        held, self._held = self._held, ""
        if self._inside:
            return Reasoned(reasoning=held)
        return Reasoned(content="".join([*self._blanks, held]))

    def _step(self, found: Reasoned) -> bool:
        """Take what is decided off the held text; False when more text is needed."""
        if self._blank:
            start = self._held.lstrip()
            if not self._tagged:
                self._blanks.append(self._held[: len(self._held) - len(start)])
            self._held = start
            if not start:
                return False
            if not self._inside:
                return self._open(start, found)
            self._blank = False
        return self._think(found)

    def _open(self, start: str, found: Reasoned) -> bool:
        """Decide between reasoning and answer by what stands before the answer."""
        tag = self.tags[0]
        if start.startswith(tag):
            self._inside = self._tagged = True
            self._held, self._blanks = start[len(tag) :], []
        elif tag.startswith(start):
            return False
        else:
            self._answering = True
            found.content, self._held, self._blanks = "".join([*self._blanks, start]), "", []
        return True

    def _think(self, found: Reasoned) -> bool:
        tag = self.tags[1]
        before, closed, after = self._held.partition(tag)
        if closed:
            found.reasoning += before
            self._inside, self._blank, self._held = False, True, after
            return True
        cut = len(before) - _overlap(before, tag)
        found.reasoning += before[:cut]
        self._held = before[cut:]
        return False


class HermesParser:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes, Qwen and SmolLM write it.

    The closing tag is looked for after the JSON object, not in its strings, and may be missing at the end of the
    output and before another call. A tag that no call follows is text.
    """

    tags = ("<tool_call>", "</tool_call>")

    def __init__(self) -> None:
        self._held = ""
        """What may be the beginning of a tag."""
        self._blanks: list[str] = []
        """Blanks at the start or after a call: no content if a call follows."""
        self._at_edge = True
        self._called = False
        self._open: _OpenCall | None = None

    def push(self, text: str) -> ToolText:
        found = ToolText()
        rest: str | None = text
        while rest is not None:
            rest = self._look(rest, found) if self._open is None else self._read(self._open, rest, found)
        return found

    def finish(self) -> ToolText:
        found = ToolText()
        while self._open is not None:
            if (call := self._open.finish()) is not None:
                self._take(call, found)
            else:
                rest: str | None = self._give_up(self._open, found)
                while rest is not None:
                    rest = self._look(rest, found) if self._open is None else self._read(self._open, rest, found)
        self._say(self._held, found)
        if not self._called:
            found.content += "".join(self._blanks)
        self._held, self._blanks = "", []
        return found

    def _look(self, text: str, found: ToolText) -> str | None:
        """Outside of calls: what stands after an opening tag, or None."""
        before, tag, after = (self._held + text).partition(self.tags[0])
        if tag:
            self._held = ""
            self._say(before, found)
            self._open = _OpenCall(self.tags)
            return after
        cut = len(before) - _overlap(before, self.tags[0])
        self._say(before[:cut], found)
        self._held = before[cut:]
        return None

    def _read(self, call: _OpenCall, text: str, found: ToolText) -> str | None:
        """Inside of a call: what stands after it, or None."""
        rest = call.feed(text)
        if call.broken:
            return self._give_up(call, found)
        if rest is not None and call.result is not None:
            self._take(call.result, found)
        return rest

    def _take(self, call: ToolCall, found: ToolText) -> None:
        self._open, self._blanks = None, []
        self._at_edge = self._called = True
        found.calls.append(call)

    def _give_up(self, call: _OpenCall, found: ToolText) -> str:
        """The tag is text, and what stands after it is read again."""
        self._open = None
        self._say(self.tags[0], found)
        return call.text

    def _say(self, text: str, found: ToolText) -> None:
        if self._at_edge:
            self._blanks.append(text)
            if not text.strip():
                return
            text, self._blanks, self._at_edge = "".join(self._blanks), [], False
        found.content += text


class _OpenCall:
    """What stands after an opening tag. `broken` once it cannot be a call; `result` is the call."""

    def __init__(self, tags: tuple[str, str]) -> None:
        self._tags = tags
        self._pieces: list[str] = []
        self._object = ObjectScanner()
        self._after = ""
        self.broken = False
        self.result: ToolCall | None = None

    @property
    def text(self) -> str:
        """All that was fed."""
        return "".join(self._pieces)

    def feed(self, text: str) -> str | None:
        """Read on; what stands after the call once it has ended, else None."""
        self._pieces.append(text)
        if not self._object.closed:
            text = text[self._object.feed(text) :]
            if self._object.broken:
                self.broken = True
                return None
            if not self._object.closed:
                return None
            self.result = _call_of(self._object)
            self.broken = self.result is None
        self._after = (self._after + text).lstrip()
        for tag, size in ((self._tags[1], len(self._tags[1])), (self._tags[0], 0)):
            if self._after.startswith(tag):
                return self._after[size:]
        self.broken = self.broken or not any(tag.startswith(self._after) for tag in self._tags)
        return None

    def finish(self) -> ToolCall | None:
        """The call, if it is whole though its closing tag has not come."""
        return self.result


def parse_call(text: str) -> ToolCall | None:
    """The call in a JSON object with "name" and "arguments" (or "parameters"); None if it is none."""
    scanner = ObjectScanner()
    rest = text[scanner.feed(text) :]
    return _call_of(scanner) if scanner.closed and not rest.strip() else None


def read_arguments(text: str) -> Any:
    """The value in the arguments of a call that comes back as history, for a template to write; `text` itself if none.

    No arguments are an empty object. A number that a float cannot hold (1e400) and NaN come as text, so that what is
    written is JSON again.
    """
    if text.strip() in ("", "null"):
        return {}
    try:
        return json.loads(text, parse_float=_finite, parse_constant=str)
    except (ValueError, RecursionError):
        return text


def _finite(number: str) -> float | str:
    value = float(number)
    return number if value in (float("inf"), float("-inf")) else value


def _call_of(scanner: ObjectScanner) -> ToolCall | None:
    members = dict(scanner.members())
    name = members.get("name", "")
    if not name.startswith('"'):
        return None
    name = unquote(name)
    if not name or LONE_SURROGATE.search(name):
        return None
    given = [text for key in ("arguments", "parameters") if (text := members.get(key, "null")) != "null"]
    return ToolCall(name, _arguments(given[0]) if given else "{}")


def _arguments(text: str) -> str:
    """The arguments as JSON text; models also write that text in a string, and nothing as an empty one."""
    if not text.startswith('"'):
        return text
    inner = escape_lone_surrogates(unquote(text))
    if inner.strip() in ("", "null"):
        return "{}"
    wrapped = f'{{"value":{inner}}}'
    scanner = ObjectScanner()
    whole = scanner.feed(wrapped) == len(wrapped) and scanner.closed
    members = scanner.members() if whole else []
    return members[0][1] if len(members) == 1 else text


def _overlap(text: str, tag: str) -> int:
    """The longest end of `text` that `tag` starts with."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)


TOOL_PARSERS: Mapping[str, Callable[[], ToolParser]] = MappingProxyType({"hermes": HermesParser})
REASONING_PARSERS: Mapping[str, Callable[[str], ReasoningParser]] = MappingProxyType({"think": ThinkParser})
