"""A JSON object in a model's text, read as it is generated: where it ends, and the text of each of its members.

Takes time linear in the text and no recursion, so depth costs nothing. Values are kept as the model wrote them, since
reading and writing them again would change them (1e400, lone surrogates, long integers). Two things that models write
and JSON does not have are mended: control characters in strings are escaped, NaN and the infinities become strings.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_WORD = re.compile(r'[^ \t\n\r,:\]}"\[{]*')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?", re.ASCII)
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_BLANK = " \t\n\r"
_SHORT_ESCAPES = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")

# What may come next.
_VALUE, _FIRST_VALUE, _KEY, _FIRST_KEY, _COLON, _NEXT = range(6)


class ObjectScanner:
    """Fed a text that begins with `{`, in pieces; `closed` after the matching `}`, `broken` where no JSON goes on."""

    def __init__(self) -> None:
        self.closed = False
        self.broken = False
        self._text: list[str] = []
        self._size = 0
        self._stack: list[str] = []
        self._expected = _VALUE
        self._in_string = False
        self._escape = ""
        """The escape that is being read, backslash included."""
        self._word: list[str] = []
        """Pieces of a number or literal that is being read."""
        self._begin = 0
        """Where the string or word that is being read begins."""
        self._key = (0, 0)
        self._value_begin = 0
        self._members: list[tuple[tuple[int, int], tuple[int, int]]] = []
        self._mends: list[tuple[int, int, str]] = []

    def feed(self, text: str) -> int:
        """Read on; returns how many characters were read: all, unless the object closed or broke."""
        at, base = 0, self._size
        while at < len(text) and not (self.closed or self.broken):
            if self._in_string:
                at = self._string(text, at, base)
            elif self._word:
                at = self._word_on(text, at, base)
            else:
                self._structure(text[at], base + at)
                at += not (self.broken or self._word)
        self._text.append(text[:at])
        self._size += at
        return at

    def members(self) -> list[tuple[str, str]]:
        """Key and JSON text of the value, of the outermost object, in order."""
        whole = "".join(self._text)
        return [(unquote(self._cut(whole, *key)), self._cut(whole, *value)) for key, value in self._members]

    def _cut(self, whole: str, begin: int, end: int) -> str:
        parts, at = [], begin
        first = bisect_left(self._mends, (begin,))
        for start, stop, mended in self._mends[first : bisect_left(self._mends, (end,))]:
            parts += [whole[at:start], mended]
            at = stop
        return "".join([*parts, whole[at:end]])

    # --- one piece of the grammar each ---

    def _structure(self, char: str, place: int) -> None:
        expected = self._expected
        if char in _BLANK:
            return
        if char == '"' and expected in (_VALUE, _FIRST_VALUE, _KEY, _FIRST_KEY):
            self._in_string, self._begin = True, place
            if expected in (_VALUE, _FIRST_VALUE):
                self._value_at(place)
        elif char in "[{" and expected in (_VALUE, _FIRST_VALUE):
            self._value_at(place)
            self._stack.append(char)
            self._expected = _FIRST_KEY if char == "{" else _FIRST_VALUE
        elif char in "]}" and self._may_close(char):
            self._stack.pop()
            self.closed = not self._stack
            self._value_ends(place + 1)
        elif char == ":" and expected == _COLON:
            self._expected = _VALUE
        elif char == "," and expected == _NEXT:
            self._expected = _KEY if self._stack[-1] == "{" else _VALUE
        elif self._stack and expected in (_VALUE, _FIRST_VALUE) and char not in ",:]}":
            self._value_at(place)
            self._begin, self._word = place, [""]
        else:
            self.broken = True

    def _may_close(self, char: str) -> bool:
        opened, first = ("{", _FIRST_KEY) if char == "}" else ("[", _FIRST_VALUE)
        return bool(self._stack) and self._stack[-1] == opened and self._expected in (first, _NEXT)

    def _string(self, text: str, at: int, base: int) -> int:
        if self._escape:
            return self._escape_on(text[at], at)
        at = _run(_PLAIN, text, at)
        if at == len(text):
            return at
        char = text[at]
        if char == "\\":
            self._escape = char
        elif char == '"':
            self._in_string = False
            if self._expected in (_KEY, _FIRST_KEY):
                if len(self._stack) == 1:
                    self._key = (self._begin, base + at + 1)
                self._expected = _COLON
            else:
                self._value_ends(base + at + 1)
        else:
            self._mends.append((base + at, base + at + 1, f"\\u{ord(char):04x}"))
        return at + 1

    def _escape_on(self, char: str, at: int) -> int:
        self._escape += char
        size = len(self._escape)
        if size == 2 and char in _SHORT_ESCAPES:
            self._escape = ""
        elif not (size == 2 and char == "u") and not (size > 2 and char in _HEX):
            self.broken = True
            return at
        elif size == 6:
            self._escape = ""
        return at + 1

    def _word_on(self, text: str, at: int, base: int) -> int:
        end = _run(_WORD, text, at)
        self._word.append(text[at:end])
        if end < len(text):
            word, self._word = "".join(self._word), []
            if word in ("NaN", "Infinity", "-Infinity"):
                self._mends.append((self._begin, base + end, f'"{word}"'))
            elif word not in ("true", "false", "null") and not _NUMBER.fullmatch(word):
                self.broken = True
            self._value_ends(base + end)
        return end

    def _value_at(self, place: int) -> None:
        if len(self._stack) == 1:
            self._value_begin = place

    def _value_ends(self, place: int) -> None:
        if len(self._stack) == 1:
            self._members.append((self._key, (self._value_begin, place)))
        self._expected = _NEXT


def escape_lone_surrogates(text: str) -> str:
    """JSON text with halves of surrogate pairs, which UTF-8 cannot carry, written as escapes."""
    return LONE_SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def _run(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where what matches from `at` on ends."""
    found = pattern.match(text, at)
    return found.end() if found else at


def unquote(text: str) -> str:
    """The string that JSON text of one spells; lone surrogates stay lone."""
    value: str = json.loads(text)
    return value
