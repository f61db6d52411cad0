"""What a chat answer's text is made of: reasoning, content and tool calls, told apart as it streams.

The parsers themselves are `hotplug.core.text.parsers` and plugins'; here they are chosen by option and chained.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hotplug.core.startup.builtin import parsers as builtin_parsers
from hotplug.core.startup.installed import gather
from hotplug.core.text.json_scan import LONE_SURROGATE, escape_lone_surrogates
from hotplug.core.text.parsers import ReasoningParser, ToolCall, ToolParser


@dataclass(slots=True)
class Parsed:
    """New text of one choice, told apart."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class ChoiceParser:
    """Tells one completion's text apart: reasoning first, then calls in what is left."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self.num_calls = 0

    def push(self, text: str) -> Parsed:
        if self._reasoning is None:
            return self._content("", text)
        found = self._reasoning.push(text)
        return self._content(found.reasoning, found.content)

    def finish(self) -> Parsed:
        """What was kept back until the completion ended."""
        parsed = Parsed()
        if self._reasoning is not None:
            rest = self._reasoning.finish()
            parsed = self._content(rest.reasoning, rest.content)
        if self._tools is not None:
            last = self._tools.finish()
            parsed.content += last.content
            parsed.calls += last.calls
            self.num_calls += len(last.calls)
        return parsed

    def _content(self, reasoning: str, text: str) -> Parsed:
        if self._tools is None:
            return Parsed(reasoning, text)
        found = self._tools.push(text)
        self.num_calls += len(found.calls)
        return Parsed(reasoning, found.content, found.calls)

    def finish_reason(self, reason: str | None) -> str | None:
        """The reason that the API reports: an answer that ended with calls awaits their results."""
        return "tool_calls" if reason == "stop" and self.num_calls else reason


@dataclass(frozen=True, slots=True)
class Parsers:
    """The parsers that a server was started with."""

    tool: Callable[[], ToolParser] | None = None
    reasoning: Callable[[str], ReasoningParser] | None = None

    def tags(self, *, tools: bool) -> tuple[str, ...]:
        """Texts that the parsers look for, which have to reach them even where they are special tokens."""
        used = [self.tool if tools else None, self.reasoning]
        return tuple(tag for parser in used for tag in getattr(parser, "tags", ()))

    def choice(self, prompt_end: str, *, tools: bool) -> ChoiceParser | None:
        """A parser for one completion after a prompt that ends so; None where there is nothing to tell apart."""
        tool = self.tool() if tools and self.tool is not None else None
        reasoning = self.reasoning(prompt_end) if self.reasoning is not None else None
        return None if tool is None and reasoning is None else ChoiceParser(reasoning, tool)


def find_parsers(tool: str | None, reasoning: str | None) -> Parsers:
    """The parsers of these names. Raises ConfigError, and PlatformError for a broken plugin.

    Plugins are loaded only for a name that is not built in.
    """
    known = builtin_parsers()
    names = {"tool_parsers": tool, "reasoning_parsers": reasoning}
    if any(name is not None and name not in getattr(known, kind) for kind, name in names.items()):
        known = gather(builtin=known)
    found = Parsers()
    if tool is not None:
        found = replace(found, tool=known.find("tool_parsers", tool, option="--tool-parser"))
    if reasoning is not None:
        found = replace(found, reasoning=known.find("reasoning_parsers", reasoning, option="--reasoning-parser"))
    return found


def render_call(call: ToolCall) -> dict[str, Any]:
    """A call in the form of the chat API, with an id of its own. What a plugin's parser gives is made encodable."""
    name = LONE_SURROGATE.sub("\ufffd", call.name)
    function = {"name": name, "arguments": escape_lone_surrogates(call.arguments)}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
