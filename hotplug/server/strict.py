"""The base of every object in a body: strict types, known fields, bounds, null as the default."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, FailFast, PrivateAttr, model_validator

from hotplug.core.errors import RequestError, nearest
from hotplug.server.bounds import Bound

Refusals = dict[str, tuple[tuple[Any, ...], str]]
"""Field -> the values (besides null) at which it asks for nothing, and why others are refused."""


class _FirstFault(FailFast):
    """A list is refused for its first entry that does not fit, without a look at the others."""

    __hash__ = object.__hash__  # for a place in a union of types


FIRST_FAULT = _FirstFault()


class Body(BaseModel):
    """A JSON object with strict types and no unknown fields. Raises RequestError naming the field."""

    model_config = ConfigDict(strict=True)

    prefix: ClassVar[str] = ""
    """What stands before a field's name when an error names it."""
    ignored: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[Refusals] = {}
    bounds: ClassVar[dict[str, Bound]] = {}
    """What a field may hold at most."""

    _size: int = PrivateAttr(0)

    @property
    def size(self) -> int:
        """Bytes of the body's JSON; 0 if it comes from none."""
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        self._size = size

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields, bounds = cls.model_fields, cls.bounds
        if data.keys() <= fields.keys() and None not in data.values():
            for name in data:
                if name in bounds:
                    bounds[name].check(cls.prefix + name, data[name])
            return data
        known: dict[str, Any] = {}
        for name, value in data.items():
            field = fields.get(name)
            if field is None:
                cls._check_other(name, value)
            elif value is not None:
                if name in bounds:
                    bounds[name].check(cls.prefix + name, value)
                known[name] = value
            elif field.is_required():
                known[name] = None
        return known

    @classmethod
    def _check_other(cls, name: str, value: Any) -> None:
        """Raises RequestError for a field that is not ours, unless it changes nothing."""
        if name in cls.ignored:
            return
        if name in cls.refused:
            neutral, why = cls.refused[name]
            if value is not None and value not in neutral:
                raise RequestError(f"{cls.prefix}{name} is refused: {why}", param=cls.prefix + name)
            return
        shown = cls.prefix + name[:80]
        hint = nearest(name, cls.model_fields) if len(name) <= 80 else ""
        raise RequestError(f"unknown field {shown}", param=shown, hint=hint)
