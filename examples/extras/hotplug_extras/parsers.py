"""Parsers for an invented dialect: `[thoughts] answer`, and calls as lines `-> name {"argument": ...}`."""

from __future__ import annotations

from hotplug.plugins import Reasoned, TagSplitter, ToolCall, ToolText


class BracketParser:
    """Reasoning stands in square brackets."""

    def __init__(self, prompt_end: str) -> None:
        self._splitter = TagSplitter("[", "]", inside=prompt_end.endswith("["))

    def push(self, text: str) -> Reasoned:
        return self._joined(self._splitter.push(text))

    def finish(self) -> Reasoned:
        return self._joined(self._splitter.finish())

    def _joined(self, parts: list[tuple[bool, str]]) -> Reasoned:
        inside = "".join(text for side, text in parts if side)
        return Reasoned(inside, "".join(text for side, text in parts if not side))


class ArrowParser:
    """A line that starts with an arrow is a call."""

    def __init__(self) -> None:
        self._line = ""

    def push(self, text: str) -> ToolText:
        found = ToolText()
        self._line += text
        while "\n" in self._line:
            line, _, self._line = self._line.partition("\n")
            self._take(line, "\n", found)
        if self._line and not "-> ".startswith(self._line[:3]):
            found.content += self._line  # cannot become a call any more
            self._line = ""
        return found

    def finish(self) -> ToolText:
        found = ToolText()
        self._take(self._line, "", found)
        self._line = ""
        return found

    def _take(self, line: str, end: str, found: ToolText) -> None:
        if not line.startswith("-> "):
            found.content += line + end
            return
        name, _, arguments = line.removeprefix("-> ").partition(" ")
        found.calls.append(ToolCall(name, arguments or "{}"))
