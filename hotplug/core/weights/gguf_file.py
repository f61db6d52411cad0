"""The GGUF container: metadata and where each tensor lies. Values are not interpreted here.

Counts, lengths and offsets are checked against the file's size before anything is made of them: a header may claim
anything.

The header is parsed here rather than by the `gguf` package because its reader builds a NumPy view for every
string of the vocabulary: 2 s for 49k tokens against 0.1 s. Block sizes and dequantization are the package's.
Format: ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hotplug.core.errors import UnsupportedModelError, WeightsError
from hotplug.core.weights.metadata import Metadata, open_regular, shown

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NUMPY = {"?": "bool"} | {code: f"<{np.dtype(code).str[1:]}" for code in "BbHhIifQqd"}
_MAX_DIMS = 4
_MOST_KEYS, _MOST_TENSORS, _MOST_STRINGS = 1 << 16, 1 << 17, 1 << 22
"""Above what any model has. Larger counts come of damage, and would take minutes to follow."""
_KEY_BYTES, _NAME_BYTES, _STRING_BYTES = 65_535, 64, 16 << 20
"""The format's own bounds on keys and names of tensors; ours on a string value."""
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
    """An open GGUF file: `values` by key and `tensors` by name, all extents checked against the file size.

    Arrays of strings are `Strings`, numeric arrays are NumPy arrays; `metadata` reads them by type. Raises
    WeightsError for a file that is truncated, corrupt or not GGUF, UnsupportedModelError for a version or variant that
    is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path, error=WeightsError) as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as e:
            raise _corrupt(path, "the file is empty") from e
        except OSError as e:
            raise WeightsError("cannot read the file", where=str(path), why=e.strerror or str(e)) from e
        self.values: dict[str, Any] = {}
        self.metadata = Metadata(self.values, str(path), error=WeightsError)
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError, OverflowError) as e:
            raise _corrupt(path, f"its header cannot be read ({e})") from e

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
        if num_tensors > _MOST_TENSORS or num_keys > _MOST_KEYS:
            raise _corrupt(self.path, f"it claims {num_tensors:,} tensors and {num_keys:,} metadata keys")
        for _ in range(num_keys):
            key = self._string(_KEY_BYTES)
            if key in self.values:
                raise _corrupt(self.path, f"the key {shown(key)} appears twice")
            self.values[key] = self._value(key, self._scalar("I"))
        self._refuse_variants()
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = self.metadata.integer("general.alignment", 1, 1 << 20, 32)
        if alignment & (alignment - 1):
            self.metadata.refuse("general.alignment", "must be a power of two", alignment)
        start = -(-self._pos // alignment) * alignment
        for name, kind, shape, offset in entries:
            if offset % alignment:
                raise _corrupt(self.path, f"tensor {name!r} begins at byte {offset:,}, no multiple of {alignment}")
            self._add_tensor(name, kind, shape, start + offset)
        self._refuse_overlaps(self.tensors.values())

    def _add_tensor(self, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...], offset: int) -> None:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if name in self.tensors:
            raise _corrupt(self.path, f"tensor {name!r} appears twice")
        nbytes = prod(shape) // block * block_bytes
        if offset + nbytes > len(self._map):
            raise _corrupt(
                self.path,
                f"tensor {name!r} ends at byte {offset + nbytes:,}, the file at {len(self._map):,}: it is truncated",
            )
        self.tensors[name] = GgufTensor(name, kind, shape, offset, nbytes)

    def _refuse_overlaps(self, tensors: Iterable[GgufTensor]) -> None:
        end, before = 0, ""
        for tensor in sorted(tensors, key=lambda t: t.offset):
            if tensor.offset < end:
                raise _corrupt(self.path, f"tensors {before!r} and {tensor.name!r} overlap")
            end, before = tensor.offset + tensor.nbytes, tensor.name

    def _refuse_variants(self) -> None:
        """What is a GGUF file and not a whole model: parts of one, adapters, statistics."""
        parts = self.metadata.integer("split.count", 0, 65_535, 0)
        if parts > 1:
            raise UnsupportedModelError(f"a GGUF split into {parts} files is not read", where=str(self.path),
                                        hint="Join the parts with llama-gguf-split --merge.")  # fmt: skip
        kind = self.metadata.text("general.type", "model", most=100)
        if kind == "adapter" or self.metadata.has("adapter.type"):
            raise UnsupportedModelError(
                "it is a LoRA adapter, not a model, and adapters are not built",
                where=str(self.path),
                hint="Merge it into its model with llama-export-lora, and serve that.",
            )
        if kind != "model" or self.metadata.has("imatrix.datasets"):
            what = _NOT_MODELS.get(kind, f"of the type {shown(kind)}") if kind != "model" else _NOT_MODELS["imatrix"]
            raise UnsupportedModelError(f"it is {what}, not a model", where=str(self.path),
                                        hint="Name the file of the model.")  # fmt: skip

    def _tensor_entry(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._string(_NAME_BYTES)
        num_dims = self._scalar("I")
        if num_dims > _MAX_DIMS:
            raise _corrupt(self.path, f"tensor {name!r} claims {num_dims} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(num_dims))[::-1]
        kind_id, offset = self._scalar("I"), self._scalar("Q")
        try:
            kind = GGMLQuantizationType(kind_id)
        except ValueError as e:
            raise UnsupportedModelError(
                f"tensor {name!r} has the unknown quantization type {kind_id}", where=str(self.path)
            ) from e
        if not shape or 0 in shape or shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise _corrupt(self.path, f"tensor {name!r} of type {kind.name} has the shape {list(shape)}")
        return name, kind, shape, offset

    def _scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._map, self._pos)[0]
        self._pos += struct.calcsize("<" + code)
        return value

    def _string(self, most: int) -> str:
        begin, self._pos = self._pos, self._end_of_string(self._pos)
        if self._pos - begin - _LENGTH.size > most:
            raise _corrupt(self.path, f"a string at byte {begin:,} is longer than {most:,} bytes")
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

    def _value(self, key: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string(_STRING_BYTES)
        if kind != _ARRAY:
            raise _corrupt(self.path, f"{shown(key)} has the unknown metadata type {kind}")
        item, count = self._scalar("I"), self._scalar("Q")
        if item not in _SCALARS and item != _STRING:
            what = "is an array of arrays" if item == _ARRAY else f"is an array of the unknown metadata type {item}"
            raise _corrupt(self.path, f"{shown(key)} {what}")
        width = _LENGTH.size if item == _STRING else struct.calcsize("<" + _SCALARS[item])
        if count * width > len(self._map) - self._pos or (item == _STRING and count > _MOST_STRINGS):
            raise _corrupt(self.path, f"{shown(key)} is an array of {count:,} items, which does not fit")
        if item == _STRING:
            return self._skip_strings(count)
        values = np.frombuffer(self._map, _NUMPY[_SCALARS[item]], count, self._pos)
        self._pos += values.nbytes
        return values


_NOT_MODELS = {
    "imatrix": "an importance matrix (statistics for quantizing)",
    "mmproj": "a projector of images or sound",
    "vocab": "a vocabulary",
}
"""`general.type` -> what to call it."""


def _corrupt(path: Path, why: str) -> WeightsError:
    return WeightsError("not a readable GGUF file", where=str(path), why=why, hint="Fetch it again.")
