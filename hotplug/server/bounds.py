"""How much a field of a body may hold, checked before anything is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hotplug.core.errors import RequestError


@dataclass(frozen=True, slots=True)
class Bound:
    """The most of a field: members of a list or an object, characters of a text or of each text in a list, and
    characters and values of all that it holds. A value of another kind is for others to refuse."""

    items: int | None = None
    chars: int | None = None
    total: int | None = None

    def check(self, name: str, value: Any) -> None:
        """Raises RequestError for more than that."""
        kind = type(value)
        if kind is str:
            self._check_chars(name, value)
        elif kind is list or kind is dict:
            if self.items is not None and len(value) > self.items:
                raise RequestError(f"{name} may hold at most {self.items} entries, got {len(value)}", param=name)
            if self.chars is not None and kind is list:
                for i, one in enumerate(value):
                    if type(one) is str:
                        self._check_chars(name, one, f"{name}[{i}]")
            if self.total is not None and _is_larger(value, self.total):
                raise RequestError(f"{name} may hold at most {self.total} characters and values", param=name)

    def _check_chars(self, name: str, text: str, place: str = "") -> None:
        if self.chars is not None and len(text) > self.chars:
            raise RequestError(f"{place or name} may have at most {self.chars} characters, got {len(text)}", param=name)


CHARS = Bound(chars=1024)
"""Of names and identifiers."""


def _is_larger(value: Any, most: int) -> bool:
    """Whether characters and values in `value`, names of members included, are more than `most`."""
    todo = [value]
    while todo and most >= 0:
        one = todo.pop()
        most -= 1
        if isinstance(one, str):
            most -= len(one)
        elif isinstance(one, list):
            most -= len(one)
            todo += one if most >= 0 else ()
        elif isinstance(one, dict):
            most -= len(one) + sum(map(len, one))
            todo += one.values() if most >= 0 else ()
    return most < 0
