"""The GGUF container: metadata and where each tensor lies. Values are not interpreted here.

The header is parsed here rather than by the `gguf` package because its reader builds a NumPy view for every
string of the vocabulary: 2 s for 49k tokens against 0.1 s. Block sizes and dequantization are the package's.
Format: ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hotplug.core.errors import UnsupportedModelError, WeightsError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NUMPY = {"?": "bool"} | {code: f"<{np.dtype(code).str[1:]}" for code in "BbHhIifQqd"}
_MAX_DIMS = 4
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's place: `shape` is row-major (outermost first), `offset` is absolute, in bytes."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Strings(Sequence[str]):
    """An array of strings, decoded when one is first asked for: an engine has no use for a vocabulary's 50,000.

    Raises WeightsError where they are not UTF-8.
    """

    def __init__(self, file: GgufFile, begin: int, count: int) -> None:
        self._file, self._begin, self._count = file, begin, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self.values[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    @cached_property
    def values(self) -> list[str]:
        """All of them."""
        return self._file.strings(self._begin, self._count)


class GgufFile:
    """An open GGUF file: `metadata` by key and `tensors` by name, all extents checked against the file size.

    Arrays of strings are `Strings`, numeric arrays are NumPy arrays. Raises WeightsError for a file that is
    truncated, corrupt or not GGUF, UnsupportedModelError for a version or variant that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as e:
            raise _corrupt(path, "the file is empty") from e
        except OSError as e:
            raise WeightsError("cannot read the file", where=str(path), why=e.strerror or str(e)) from e
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError, OverflowError) as e:
            raise _corrupt(path, f"its header cannot be read ({e})") from e
        self._refuse_variants()

    def raw(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """The tensor's bytes as stored, [rows, row_bytes], a read-only view of the mapped file."""
        flat = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)
        return flat.reshape(prod(tensor.shape[:-1]), -1)

    def strings(self, begin: int, count: int) -> list[str]:
        """`count` strings that follow each other from byte `begin` on. Raises WeightsError."""
        out, pos = [], begin
        try:
            for _ in range(count):
                end = self._end_of_string(pos)
                out.append(self._map[pos + _LENGTH.size : end].decode())
                pos = end
        except UnicodeDecodeError as e:
            raise _corrupt(self.path, f"a string at byte {pos:,} is not UTF-8 ({e})") from e
        return out

    def release(self) -> None:
        """Give back the memory that what was read of the file holds in this process; views stay good."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on every system
            self._map.madvise(mmap.MADV_DONTNEED)

    def _parse(self) -> None:
        if self._map[:4] != b"GGUF":
            raise _corrupt(self.path, "it does not begin with the GGUF magic")
        self._pos = 4
        version = self._scalar("I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "big-endian GGUF" if swapped in (2, 3) else f"GGUF version {version}"
            raise UnsupportedModelError(
                f"{kind} is not read", where=str(self.path), hint="Versions 2 and 3, little-endian, are."
            )
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        for _ in range(num_keys):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise _corrupt(self.path, f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self._pos // alignment) * alignment
        for name, shape, kind_id, offset in entries:
            self._add_tensor(name, shape, kind_id, start + offset)

    def _add_tensor(self, name: str, shape: tuple[int, ...], kind_id: int, offset: int) -> None:
        try:
            kind = GGMLQuantizationType(kind_id)
        except ValueError as e:
            raise UnsupportedModelError(
                f"tensor {name!r} has the unknown quantization type {kind_id}", where=str(self.path)
            ) from e
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if name in self.tensors:
            raise _corrupt(self.path, f"tensor {name!r} appears twice")
        if not shape or 0 in shape or shape[-1] % block:
            raise _corrupt(self.path, f"tensor {name!r} of type {kind.name} has the shape {list(shape)}")
        nbytes = prod(shape) // block * block_bytes
        if offset + nbytes > len(self._map):
            raise _corrupt(
                self.path,
                f"tensor {name!r} ends at byte {offset + nbytes:,}, the file at {len(self._map):,}: it is truncated",
            )
        self.tensors[name] = GgufTensor(name, kind, shape, offset, nbytes)

    def _refuse_variants(self) -> None:
        if self.metadata.get("split.count", 0) > 1:
            raise UnsupportedModelError(
                f"a GGUF split into {self.metadata['split.count']} files is not read",
                where=str(self.path),
                hint="Join the parts with llama-gguf-split --merge.",
            )

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dims = self._scalar("I")
        if num_dims > _MAX_DIMS:
            raise _corrupt(self.path, f"tensor {name!r} claims {num_dims} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(num_dims))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._map, self._pos)[0]
        self._pos += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        begin, self._pos = self._pos, self._end_of_string(self._pos)
        return self._map[begin + _LENGTH.size : self._pos].decode()

    def _end_of_string(self, begin: int) -> int:
        end: int = begin + _LENGTH.size + _LENGTH.unpack_from(self._map, begin)[0]
        if end > len(self._map):
            raise _corrupt(self.path, f"a string at byte {begin:,} runs past the end of the file")
        return end

    def _skip_strings(self, count: int) -> Strings:
        begin = pos = self._pos
        data, size, unpack, width = self._map, len(self._map), _LENGTH.unpack_from, _LENGTH.size
        for _ in range(count):  # inlined `_end_of_string`: twice as fast
            at, pos = pos, pos + width + unpack(data, pos)[0]
            if pos > size:
                raise _corrupt(self.path, f"a string at byte {at:,} runs past the end of the file")
        self._pos = pos
        return Strings(self, begin, count)

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise _corrupt(self.path, f"unknown metadata type {kind} at byte {self._pos:,}")
        item, count = self._scalar("I"), self._scalar("Q")
        smallest = 8 if item == _STRING else struct.calcsize("<" + _SCALARS[item]) if item in _SCALARS else 12
        if count * smallest > len(self._map) - self._pos:
            raise _corrupt(self.path, f"an array of {count:,} items at byte {self._pos:,} does not fit")
        if item == _STRING:
            return self._skip_strings(count)
        if item not in _SCALARS:
            return [self._value(item) for _ in range(count)]
        values = np.frombuffer(self._map, _NUMPY[_SCALARS[item]], count, self._pos)
        self._pos += values.nbytes
        return values


def _corrupt(path: Path, why: str) -> WeightsError:
    return WeightsError("not a readable GGUF file", where=str(path), why=why, hint="Fetch it again.")
