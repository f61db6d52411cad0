"""What model files say, read through one accessor: every value with its type and range, every error by file and key.

`Metadata` stands in front of the raw values of whatever format said them (JSON, GGUF); nothing else looks into them.
`read_json` and `open_regular` bound what is read at all: the size, the depth and the kind of file.
"""

from __future__ import annotations

import codecs
import json
import reprlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar, overload

import numpy as np
import numpy.typing as npt

from hotplug.core.errors import ModelError, UnsupportedModelError

MOST_BYTES = 64 << 20
"""Of a JSON file. The index of a checkpoint of 100,000 tensors has 10 MB."""
_MOST_DEPTH = 32
_MOST_TEXT = 16 << 20
"""Characters of one string. The longest that files hold are chat templates, of up to 100 KB."""


class _Required:
    """Stands for "no default" where None is one."""


REQUIRED = _Required()
_T = TypeVar("_T")


class Metadata:
    """Values of a file by key. A key that is absent, or null in JSON, has its default.

    `where` is the file's name for errors, `prefix` what keys begin with in the file, `error` what is raised for a value
    of another type or out of range.
    """

    def __init__(
        self, values: Mapping[str, Any], where: str, *, prefix: str = "", error: type[ModelError] = ModelError
    ) -> None:
        self._values, self.where, self._prefix, self._error = values, where, prefix, error

    def has(self, key: str) -> bool:
        """Whether there is a value, and not null."""
        return self._get(key) is not None

    def present(self, key: str) -> bool:
        """Whether the key is there, be it with null."""
        return self._prefix + key in self._values

    def keys(self) -> Iterator[str]:
        """Keys that begin with the prefix, without it."""
        return (key[len(self._prefix) :] for key in self._values if key.startswith(self._prefix))

    @overload
    def integer(self, key: str, low: int, high: int, default: int | _Required = ...) -> int: ...
    @overload
    def integer(self, key: str, low: int, high: int, default: None) -> int | None: ...
    def integer(self, key: str, low: int, high: int, default: int | _Required | None = REQUIRED) -> int | None:
        """A whole number from `low` to `high`."""
        value = self._get(key)
        if value is None:
            return self._default(key, default)
        if type(value) is not int or not low <= value <= high:
            self.refuse(key, f"must be a whole number from {low:,} to {high:,}", value)
        return value

    @overload
    def number(self, key: str, low: float, high: float, default: float | _Required = ...) -> float: ...
    @overload
    def number(self, key: str, low: float, high: float, default: None) -> float | None: ...
    def number(self, key: str, low: float, high: float, default: float | _Required | None = REQUIRED) -> float | None:
        """A float from `low` to `high`, so never NaN."""
        value = self._get(key)
        if value is None:
            return self._default(key, default)
        if type(value) not in (int, float) or not low <= value <= high:
            self.refuse(key, f"must be a number from {low:g} to {high:g}", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; numbers and words are neither."""
        value = self._get(key)
        if value is None:
            return default
        if type(value) is not bool:
            self.refuse(key, "must be true or false", value)
        return value

    @overload
    def text(self, key: str, default: str | _Required = ..., *, most: int = ...) -> str: ...
    @overload
    def text(self, key: str, default: None, *, most: int = ...) -> str | None: ...
    def text(self, key: str, default: str | _Required | None = REQUIRED, *, most: int = _MOST_TEXT) -> str | None:
        """A string of at most `most` characters that UTF-8 can carry."""
        value = self._get(key)
        if value is None:
            return self._default(key, default)
        if type(value) is not str:
            self.refuse(key, "must be a string", value)
        if len(value) > most:
            self.refuse(key, f"must have at most {most:,} characters, it has {len(value):,}")
        if not _encodable(value):
            self.refuse(key, "must be text, it has half of a surrogate pair", value)
        return value

    def section(self, key: str) -> Metadata:
        """The object under `key`, empty where there is none."""
        value = self._get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "must be an object", value)
        return Metadata(value or {}, f"{self.where}: {self._prefix}{key}", error=self._error)

    def sections(self, key: str) -> list[Metadata]:
        """The objects of the list under `key`, none where there is none."""
        value = self._get(key) or ()
        if not isinstance(value, list | tuple) or not all(isinstance(item, dict) for item in value):
            self.refuse(key, "must be a list of objects", value)
        return [Metadata(v, f"{self.where}: {self._prefix}{key}[{i}]", error=self._error) for i, v in enumerate(value)]

    def is_list(self, key: str) -> bool:
        """Whether a list is under `key`."""
        return isinstance(self._get(key), list)

    def is_section(self, key: str) -> bool:
        """Whether an object is under `key`."""
        return isinstance(self._get(key), dict)

    def texts(self, key: str, *, most: int, longest: int = _MOST_TEXT) -> list[str] | None:
        """A list of at most `most` strings of at most `longest` characters; None where there is none.

        An array of strings is decoded here.
        """
        value = self._get(key)
        if value is None:
            return None
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) > most:
            self.refuse(key, f"must be a list of at most {most:,} strings", value)
        found = value if isinstance(value, list) else list(value)
        if isinstance(value, list) and not all(type(item) is str and _encodable(item) for item in found):
            self.refuse(key, "must be a list of strings", value)
        if found and max(map(len, found)) > longest:
            self.refuse(key, f"must hold strings of at most {longest:,} characters")
        return found

    def integers(self, key: str, low: int, high: int, *, most: int) -> list[int] | None:
        """A list of at most `most` whole numbers, each from `low` to `high`; None where there is none."""
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > most:
            self.refuse(key, f"must be a list of at most {most:,} whole numbers", value)
        for item in value:
            if type(item) is not int or not low <= item <= high:
                self.refuse(key, f"must hold whole numbers from {low:,} to {high:,}", item)
        return value

    def array(self, key: str, size: int) -> npt.NDArray[Any] | None:
        """A numeric array of `size` finite values, as it is stored; None where there is none."""
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf" or value.size != size:
            self.refuse(key, f"must be an array of {size:,} numbers", value)
        if not np.isfinite(value).all():
            self.refuse(key, "must hold finite numbers")
        return value

    def one_or_many(self, key: str, *, most: int = 1024) -> list[int]:
        """A whole number, or a list of at most `most`, of whatever range; none where there is none."""
        value = self._get(key)
        if value is None:
            return []
        found = [value] if type(value) is int else value
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size <= most:
            found = value.tolist()
        if not isinstance(found, list) or len(found) > most or not all(type(item) is int for item in found):
            self.refuse(key, f"must be a whole number or a list of at most {most:,}", value)
        return found

    def by_layer(self, key: str, low: int, high: int, default: int | _Required = REQUIRED) -> int:
        """A whole number, which may be given once for each layer, the same each time."""
        value = self._get(key)
        if not isinstance(value, np.ndarray):
            return self.integer(key, low, high, default)
        if value.dtype.kind not in "iu" or value.size == 0:
            self.refuse(key, f"must be a whole number from {low:,} to {high:,}", value)
        if (value != value[0]).any():
            raise UnsupportedModelError(f"{self._prefix}{key} differs by layer, which is not built", where=self.where)
        each = Metadata({self._prefix + key: value[0].item()}, self.where, prefix=self._prefix, error=self._error)
        return each.integer(key, low, high)

    def refuse(self, key: str, what: str, value: Any = REQUIRED) -> NoReturn:
        """Raise the error of this file about `key`: `what` it must be, `value` what it is."""
        got = "" if value is REQUIRED else f", got {shown(value)}"
        raise self._error(f"{brief(self._prefix + key)} {what}{got}", where=self.where)

    def _get(self, key: str) -> Any:
        return self._values.get(self._prefix + key)

    def _default(self, key: str, default: _T | _Required) -> _T:
        if isinstance(default, _Required):
            raise self._error(f"{self._prefix}{key} is missing", where=self.where)
        return default


def shown(value: Any) -> str:
    """A value in a message: a line at most, whatever it holds."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.size:,}"
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    return _SHORT.repr(value)


def brief(text: object) -> str:
    """Text of a file, or of a library about one, in a message: 300 characters at most."""
    whole = str(text)
    return whole if len(whole) <= 300 else whole[:300] + " ..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 2, 4, 4


def read_json(path: Path, *, error: type[ModelError] = ModelError) -> Metadata:
    """The object in a JSON file. Raises `error` for what is no file, too large, too deep, or not strict JSON."""
    values = read_json_object(path, error=error)
    return Metadata(values, str(path), error=error)


def read_json_object(path: Path, *, error: type[ModelError] = ModelError) -> dict[str, Any]:
    """`read_json`, as a dictionary."""
    where = str(path)
    text = read_text(path, error=error)
    try:
        values = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError as e:
        raise error(f"it is nested more than {_MOST_DEPTH} deep", where=where) from e
    except ValueError as e:
        raise error("not valid JSON", where=where, why=str(e), hint="Mend it, or fetch it again.") from e
    if not isinstance(values, dict):
        raise error("not a JSON object", where=where)
    if _deeper(values, _MOST_DEPTH):
        raise error(f"it is nested more than {_MOST_DEPTH} deep", where=where)
    return values


def read_text(path: Path, *, error: type[ModelError] = ModelError) -> str:
    """The text of a file. Raises `error` for what is no file, too large, or not UTF-8."""
    with open_regular(path, error=error) as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise error(f"it has more than {MOST_BYTES >> 20} MiB", where=str(path))
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as e:
        raise error("it is not UTF-8", where=str(path), why=str(e), hint="Fetch it again.") from e


def open_regular(path: Path, *, error: type[ModelError] = ModelError) -> BinaryIO:
    """The file, opened to read. Raises `error` where there is none, for a folder, and for a pipe, which would hang."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise error("it is not a file", where=str(path))
        return path.open("rb")
    except (OSError, ValueError) as e:  # ValueError: a name with a NUL
        why = (e.strerror if isinstance(e, OSError) else None) or str(e)
        raise error("cannot read the file", where=str(path), why=why) from e


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} appears twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _deeper(values: Any, depth: int) -> bool:
    """Whether lists and objects are nested more than `depth` deep, found level by level."""
    level = [values]
    for _ in range(depth):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
