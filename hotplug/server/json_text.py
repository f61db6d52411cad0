"""Strict JSON of a request's body to Python values, within bounds, so that what comes after may rely on them.

What RFC 8259 leaves to readers is decided here: UTF-8 only and no byte order mark, no NaN, no member twice, no half of
a surrogate pair, numbers of 64 bits, and bounds on depth and on the number of values. The first fault ends it, in one
short RequestError that names the member where there is one.

A small text is read by the standard library's scanner, in C. That holds the interpreter's lock until it is through, so
a large one is read here piece by piece, for use in a thread: no piece holds the lock for more than a few milliseconds
(a list of 8 MB in C would do so for 100 ms and more), and nothing past a bound is read.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from contextlib import suppress
from json.decoder import scanstring
from typing import Any

from hotplug.core.errors import RequestError

MAX_DEPTH = 100
"""Lists and objects within each other."""
MAX_VALUES = 100_000
"""Values in one body, integers in lists not counted: more than any conversation within a context has."""
SMALL = 1 << 16
"""Bytes up to which a text is read in C, in about a millisecond."""
_LEAST, _MOST = -(2**63), 2**64 - 1
MAX_INTEGERS = 1 << 20
"""Integers in all lists of one body: giving back the memory of more takes too long at once."""
_PIECE = 1 << 15
"""Characters of a string, of blanks or of a list of integers that are read at a time."""
_SLICE = 1 << 20
"""Bytes that are decoded at a time."""

_BETWEEN = ", \t\n\r"
_FIRST_NAME = re.compile(r"[.\[]")
_BLANKS = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"(-?(?:0|[1-9][0-9]*))(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_INTEGERS = re.compile(r"(?:-?(?:0|[1-9][0-9]{0,17})[ \t\n\r]*,[ \t\n\r]*)+")
_IN_STRING = re.compile(
    r'(?:[^"\\]|\\[^u]|\\u(?:(?![dD][89abAB])[0-9a-fA-F]{4}|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))*+'
)
"""What a string may be cut behind: whole characters, escapes and pairs of them."""
_LONE_HIGH = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_WORDS = {"t": ("true", True), "f": ("false", False), "n": ("null", None)}
_MARKS = ((b"\xef\xbb\xbf", "a byte order mark"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))


def read(data: bytes) -> Any:
    """The value of a JSON text. Raises RequestError."""
    text = _decode(data)
    if len(data) <= SMALL:
        value = _read_small(text)
        if not _is_fine(value, 0) or ("\\u" in text and _ESCAPED_SURROGATE.search(text)):
            _check(value, "", 0)
        return value
    return _Reader(text).read()


# --- characters -------------------------------------------------------------------------------------


def _decode(data: bytes) -> str:
    """The text of UTF-8, without holding the interpreter's lock for long."""
    if data[:1] == b"{" and len(data) <= SMALL and b"\0" not in data[:4]:
        with suppress(UnicodeDecodeError):  # told below
            return data.decode()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff", b"\xef\xbb") or b"\0" in data[:4]:
        found = next((what for mark, what in _MARKS if data.startswith(mark)), "UTF-16 or UTF-32")
        raise RequestError(f"the body begins with {found}", hint="Send UTF-8 without a byte order mark.")
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    parts = []
    for begin in range(0, len(data) or 1, _SLICE):
        pending = len(decoder.getstate()[0])
        try:
            parts.append(decoder.decode(data[begin : begin + _SLICE], begin + _SLICE >= len(data)))
        except UnicodeDecodeError as e:
            at = begin - pending + e.start
            raise RequestError(f"the body is not UTF-8: byte 0x{data[at]:02x} at {at} begins no character",
                               hint="Encode it as UTF-8.") from e  # fmt: skip
    return parts[0] if len(parts) == 1 else "".join(parts)


# --- in one piece -----------------------------------------------------------------------------------


class _RepeatedError(Exception):
    """A member that an object has twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedError(next(name for i, name in enumerate(names) if name in names[:i]))
    return members


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def _read_small(text: str) -> Any:
    try:
        return _decoder.decode(text)
    except json.JSONDecodeError as e:
        raise _malformed(e.msg, e.pos) from e
    except _RepeatedError as e:
        raise _repeated(str(e)) from e
    except RecursionError as e:
        raise _too_deep() from e
    except ValueError as e:  # Python's bound on the digits of an integer
        raise RequestError("the body holds an integer of thousands of digits", hint="Numbers have 64 bits.") from e


def _is_fine(value: Any, depth: int) -> bool:
    """Whether depth and numbers keep to the bounds. Called for every request: no path is made up for an error."""
    kind = type(value)
    if kind is dict:
        value = value.values()
    elif kind is not list:
        return kind is str or _is_in_range(value)
    if depth == MAX_DEPTH:
        return False
    for one in value:
        kind = type(one)
        if kind is str:
            continue
        if not (_is_fine(one, depth + 1) if kind is dict or kind is list else _is_in_range(one)):
            return False
    return True


def _is_in_range(value: Any) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    return value is None or _LEAST <= value <= _MOST


def _check(value: Any, path: str, depth: int) -> None:
    """Raises RequestError for what no member may hold, under the member's name."""
    if isinstance(value, str):
        if half := _SURROGATE.search(value):
            raise _half_a_pair(half.group(), path)
    elif isinstance(value, int | float):
        _check_number(value, path)
    elif isinstance(value, dict):
        if depth == MAX_DEPTH:
            raise _too_deep()
        for name, member in value.items():
            if half := _SURROGATE.search(name):
                raise _half_a_pair(half.group(), path)
            _check(member, f"{path}.{name[:80]}" if path else name[:80], depth + 1)
    elif isinstance(value, list):
        if depth == MAX_DEPTH:
            raise _too_deep()
        for i, one in enumerate(value):
            _check(one, f"{path}[{i}]", depth + 1)


# --- piece by piece ---------------------------------------------------------------------------------


class _Reader:
    """Reads one text; a method returns a value and the position after it."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._left = MAX_VALUES
        self._integers = 0

    def read(self) -> Any:
        value, end = self._value(self._skip(0), "", 0)
        end = self._skip(end)
        if end != len(self._text):
            raise _malformed("Extra data", end)
        return value

    def _skip(self, at: int) -> int:
        while (found := _BLANKS.match(self._text, at, at + _PIECE)) and found.end() == at + _PIECE:
            at = found.end()
        return at if found is None else found.end()

    def _value(self, at: int, path: str, depth: int) -> tuple[Any, int]:
        self._left -= 1
        if self._left < 0:
            raise RequestError(f"the body holds over {MAX_VALUES} values", param=_FIRST_NAME.split(path)[0] or None,
                               hint="Send less in one request.")  # fmt: skip
        first = self._text[at : at + 1]
        if first == '"':
            return self._string(at, path)
        if first and first in "{[":
            if depth == MAX_DEPTH:
                raise _too_deep()
            return (self._members if first == "{" else self._items)(self._skip(at + 1), path, depth + 1)
        if first in _WORDS:
            word, value = _WORDS[first]
            if self._text.startswith(word, at):
                return value, at + len(word)
        elif number := _NUMBER.match(self._text, at, at + 5000):
            return _number_of(number, path), number.end()
        raise _malformed("Expecting value", at)

    def _string(self, at: int, path: str) -> tuple[str, int]:
        """The string whose quote is at `at`."""
        text, at = self._text, at + 1
        pieces: list[str] = []
        while True:
            run = _IN_STRING.match(text, at, at + _PIECE)
            end = at if run is None else run.end()
            if end == at:
                break
            pieces.append(_piece_of(text[at:end], at, path))
            at = end
        if text[at : at + 1] != '"':
            if half := _LONE_HIGH.match(text, at):
                raise _half_a_pair(chr(int(half.group()[2:], 16)), path)
            raise _malformed("Invalid escape" if text[at : at + 1] else "Unterminated string", at)
        return pieces[0] if len(pieces) == 1 else "".join(pieces), at + 1

    def _members(self, at: int, path: str, depth: int) -> tuple[dict[str, Any], int]:
        members: dict[str, Any] = {}
        text = self._text
        if text[at : at + 1] == "}":
            return members, at + 1
        while True:
            if text[at : at + 1] != '"':
                raise _malformed("Expecting property name enclosed in double quotes", at)
            name, at = self._string(at, path)
            if name in members:
                raise _repeated(name)
            at = self._skip(at)
            if text[at : at + 1] != ":":
                raise _malformed("Expecting ':' delimiter", at)
            members[name], at = self._value(self._skip(at + 1), f"{path}.{name[:80]}" if path else name, depth)
            at = self._skip(at)
            if text[at : at + 1] == "}":
                return members, at + 1
            if text[at : at + 1] != ",":
                raise _malformed("Expecting ',' delimiter", at)
            at = self._skip(at + 1)

    def _items(self, at: int, path: str, depth: int) -> tuple[list[Any], int]:
        items: list[Any] = []
        text = self._text
        if text[at : at + 1] == "]":
            return items, at + 1
        while True:
            before = len(items)
            while run := _INTEGERS.match(text, at, at + _PIECE):
                items += json.loads("[" + run.group().rstrip(_BETWEEN) + "]")
                self._integers += len(items) - before
                if self._integers > MAX_INTEGERS:
                    raise RequestError(f"the body holds over {MAX_INTEGERS} integers", param=path or None)
                before = len(items)
                at = self._skip(run.end())
            value, at = self._value(at, f"{path}[{len(items)}]", depth)
            items.append(value)
            at = self._skip(at)
            if text[at : at + 1] == "]":
                return items, at + 1
            if text[at : at + 1] != ",":
                raise _malformed("Expecting ',' delimiter", at)
            at = self._skip(at + 1)


def _piece_of(raw: str, at: int, path: str) -> str:
    """The characters of a part of a string's text, which stands at `at`."""
    try:
        piece, _ = scanstring(raw + '"', 0, True)
    except json.JSONDecodeError as e:
        raise _malformed(e.msg, at + e.pos) from e
    if not piece.isascii() and (half := _SURROGATE.search(piece)):
        raise _half_a_pair(half.group(), path)
    return piece


def _number_of(number: re.Match[str], path: str) -> int | float:
    whole, fraction, exponent = number.groups()
    if fraction is None and exponent is None:
        if len(whole) > 4000:
            raise RequestError("the body holds an integer of thousands of digits", param=path or None,
                               hint="Numbers have 64 bits.")  # fmt: skip
        value: int | float = int(whole)
    else:
        value = float(number.group())
    _check_number(value, path)
    return value


# --- faults -----------------------------------------------------------------------------------------


def _check_number(value: int | float, path: str) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RequestError(f"{path or 'the body'} must be a finite number of 64 bits", param=path or None)
    elif not _LEAST <= value <= _MOST:
        raise RequestError(f"{path or 'the body'} is an integer out of the range of 64 bits", param=path or None)


def _malformed(why: str, at: int) -> RequestError:
    return RequestError(f"the body is not valid JSON: {why} at character {at}")


def _repeated(name: str) -> RequestError:
    return RequestError(f"the body holds the member {name[:80]!r} twice", param=name[:80])


def _too_deep() -> RequestError:
    return RequestError(f"the body is nested more than {MAX_DEPTH} deep")


def _half_a_pair(half: str, path: str) -> RequestError:
    return RequestError(f"the body holds half a surrogate pair, \\u{ord(half):04x}", param=path or None)
