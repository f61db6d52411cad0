"""Checks of values that come from outside: type, range, length, depth, and whether text is text.

A rule takes a parameter's name and a value, and gives the value as plain Python (an int for a NumPy integer, a tuple
for a list), so that what has passed can be sent to another process and put into a tensor. It raises RequestError that
names the parameter, whatever the value is: nothing here prints, walks or converts more of a value than its bound.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, NoReturn

from hotplug.core.errors import RequestError

Rule = Callable[[str, Any], Any]

INT32, INT64 = 2**31 - 1, 2**63 - 1
"""The largest of each."""
_SHOWN = 60
"""Characters of a value that a message shows."""


def shown(value: object) -> str:
    """A value for a message: short whatever it is."""
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        return repr(value[:_SHOWN]) + (" and more" if len(value) > _SHOWN else "")
    return f"a {type(value).__name__}"


def refuse(name: str, requirement: str, value: object) -> NoReturn:
    """Raise RequestError: `name` must be `requirement`."""
    raise RequestError(f"{name} must be {requirement}, got {shown(value)}", param=name)


def optional(rule: Rule) -> Rule:
    """`rule`, or None."""

    def check(name: str, value: Any) -> Any:
        return None if value is None else rule(name, value)

    return check


def integer(low: int, high: int, requirement: str = "") -> Rule:
    """An integer from `low` to `high`; not a bool, and no float though it be whole."""
    requirement = requirement or f"an integer from {low} to {high}"

    def check(name: str, value: Any) -> int:
        found = value
        if type(value) is not int:
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                refuse(name, requirement, value)
            found = int(value)
        if not low <= found <= high:
            refuse(name, requirement, value)
        return found

    return check


def number(low: float, high: float, *, above: bool = False) -> Rule:
    """A real number from `low` to `high`, or `above` low; NaN is none, nor is a bool."""
    requirement = f"a number {f'above {low:g} and at most' if above else f'from {low:g} to'} {high:g}"

    def check(name: str, value: Any) -> float:
        found = value
        if type(value) is not float:
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                refuse(name, requirement, value)
            try:
                found = float(value)
            except OverflowError:
                refuse(name, requirement, value)
        if not low <= found <= high or (above and found == low):
            refuse(name, requirement, value)
        return found

    return check


def flag(name: str, value: Any) -> bool:
    """True or False, also NumPy's."""
    kind = type(value)
    if kind is not bool and not (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")):
        refuse(name, "true or false", value)
    return bool(value)


def text(most: int, *, least: int = 0) -> Rule:
    """Text of `least` to `most` characters that UTF-8 can write: no half of a surrogate pair."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            refuse(name, "text", value)
        if not least <= len(value) <= most:
            bounds = f"at most {most} characters" if len(value) > most else f"at least {least}"
            raise RequestError(f"{name} must have {bounds}, got {len(value)}", param=name)
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as e:
                half = f"\\u{ord(e.object[e.start]):04x} at character {e.start}"
                raise RequestError(f"{name} holds half of a surrogate pair, {half}", param=name,
                                   hint="Send whole characters.") from None  # fmt: skip
        return value if type(value) is str else str.__str__(value)

    return check


def texts(most: int, rule: Rule) -> Rule:
    """A tuple of at most `most` texts, of a text or of several; None is none."""
    several = _several(most, rule, "text or a list of texts")

    def check(name: str, value: Any) -> Any:
        return several(name, (value,) if isinstance(value, str) else value)

    return check


def integers(most: int, low: int, high: int) -> Rule:
    """A tuple of at most `most` integers from `low` to `high`, of any iterable of them; None is none."""
    several = _several(most, integer(low, high, f"integers from {low} to {high}"), "a list of integers")

    def check(name: str, value: Any) -> Any:
        return value if type(value) is tuple and _are_integers(value, most, low, high) else several(name, value)

    return check


def _several(most: int, rule: Rule, requirement: str) -> Rule:
    def check(name: str, value: Any) -> Any:
        if value is None:
            return ()
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            refuse(name, requirement, value)
        try:
            found = tuple(islice(value, most + 1))
        except TypeError:  # an array without dimensions
            refuse(name, requirement, value)
        if len(found) > most:
            raise RequestError(f"{name} takes at most {most} values, got more", param=name)
        return tuple(rule(name, one) for one in found)

    return check


def biases(most: int, limit: float) -> Rule:
    """A dict of at most `most` numbers from -`limit` to `limit` by token id, which may be written as text, as JSON has
    it; None where there is none."""
    token, bias = integer(0, INT32, "keyed by token ids"), number(-limit, limit)

    def check(name: str, value: Any) -> dict[int, float] | None:
        if not isinstance(value, Mapping):
            refuse(name, "numbers by token id", value)
        if len(value) > most:
            raise RequestError(f"{name} takes at most {most} token ids, got {len(value)}", param=name)
        if _are_integers(value, most, 0, INT32) and set(map(type, value.values())) == {float}:
            values = value.values()
            if -limit <= min(values) and max(values) <= limit and not any(one != one for one in values):
                return dict(value)
        return {token(name, _written(key)): bias(name, one) for key, one in value.items()} or None

    return check


def _are_integers(values: Iterable[Any], most: int, low: int, high: int) -> bool:
    """Whether all is right already: one by one, hundreds of values cost the engine's loop a millisecond."""
    found = tuple(values)
    if not found:
        return True
    return len(found) <= most and set(map(type, found)) == {int} and low <= min(found) and max(found) <= high


def _written(key: Any) -> Any:
    """A token id that is written as text, as an integer."""
    return int(key) if isinstance(key, str) and len(key) <= 10 and key.isascii() and key.isdecimal() else key


def plain(depth: int, size: int) -> Rule:
    """What JSON can say, copied: nested at most `depth` deep, of at most `size` characters and values in all.

    Integers have 64 bits, numbers are finite, keys are text.
    """

    def check(name: str, value: Any) -> Any:
        return _PlainCopy(name, depth, size).of(value, 0)

    return check


class _PlainCopy:
    """Copies one value; see `plain`."""

    def __init__(self, name: str, depth: int, size: int) -> None:
        self._name, self._depth, self._size, self._left = name, depth, size, size

    def of(self, value: Any, depth: int) -> Any:
        self._take(1)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, numbers.Integral):
            return _INT64(self._name, value)
        if isinstance(value, numbers.Real):
            return _FINITE(self._name, value)
        if not isinstance(value, Mapping | list | tuple):
            refuse(self._name, "made of JSON values", value)
        if depth == self._depth:
            raise RequestError(f"{self._name} is nested more than {self._depth} deep", param=self._name)
        if isinstance(value, Mapping):
            return {self._key(key): self.of(one, depth + 1) for key, one in value.items()}
        return [self.of(one, depth + 1) for one in value]

    def _key(self, key: Any) -> Any:
        if not isinstance(key, str):
            refuse(self._name, "keyed by text", key)
        return self._text(key)

    def _text(self, value: str) -> Any:
        self._take(len(value))
        return _TEXT(self._name, value)

    def _take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise RequestError(f"{self._name} is larger than {self._size} characters and values", param=self._name)


_INT64 = integer(-INT64 - 1, INT64, "made of integers of 64 bits")
_FINITE = number(-sys.float_info.max, sys.float_info.max)
_TEXT = text(INT64)
