"""The prompts of a completion: one text or several, one list of token ids or several, as a list.

They are checked here and not by pydantic, which tries each of the four forms to its end and reports every entry that
does not fit.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from hotplug.core.errors import RequestError

MAX_COMPLETIONS = 2048
"""Completions that one body may ask for: prompts times n."""
_AT_ONCE = 1 << 16
"""Token ids that are looked at in one go."""


def read_prompts(value: Any) -> list[str] | list[list[int]]:
    """Raises RequestError. No prompt is empty text or no list, but a list of token ids may be empty."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise _wrong("prompt", value)
    if value and type(value[0]) is int:
        _check_integers(value, "prompt")
        return [value]
    if not 0 < len(value) <= MAX_COMPLETIONS:
        raise RequestError(f"prompt must hold 1 to {MAX_COMPLETIONS} prompts, got {len(value)}", param="prompt",
                           hint="Send several requests.")  # fmt: skip
    kind = type(value[0])
    if kind is not str and kind is not list:
        raise _wrong("prompt[0]", value[0])
    for i, one in enumerate(value):
        if type(one) is not kind:
            raise _wrong(f"prompt[{i}]", one)
        if kind is list:
            _check_integers(one, f"prompt[{i}]")
    return value


def _check_integers(ids: list[Any], place: str) -> None:
    for begin in range(0, len(ids), _AT_ONCE):
        part = ids[begin : begin + _AT_ONCE]
        if set(map(type, part)) != {int}:
            at, wrong = next((i, one) for i, one in enumerate(part, begin) if type(one) is not int)
            raise RequestError(f"{place}[{at}] must be a token id, got {type(wrong).__name__}", param="prompt")


def _wrong(place: str, value: Any) -> RequestError:
    return RequestError(f"{place} must be a text or a list of token ids (all prompts of one kind), got "
                        f"{type(value).__name__}", param="prompt")  # fmt: skip


_IDS = {"type": "array", "items": {"type": "integer"}}
_TEXT = {"type": "string"}
_FORMS = [_TEXT, _IDS, {"type": "array", "items": _TEXT}, {"type": "array", "items": _IDS}]

Prompts = Annotated[
    list[str] | list[list[int]], PlainValidator(read_prompts), WithJsonSchema({"anyOf": _FORMS, "title": "Prompt"})
]
