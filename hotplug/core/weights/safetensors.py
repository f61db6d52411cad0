"""A Hugging Face folder of safetensors, whole or in shards, as a checkpoint.

Which file counts, which of several copies of a tensor, and whether embedding and head are one, is as transformers
has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hotplug.core.errors import UnsupportedModelError, WeightsError
from hotplug.core.weights.config import ModelConfig
from hotplug.core.weights.dequantize_target import DequantizeTarget, no_target
from hotplug.core.weights.hf_config import SUPPORTED_ARCHITECTURES
from hotplug.core.weights.metadata import Metadata, brief, open_regular, read_json, shown
from hotplug.core.weights.promised import check_promised, some

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_MOST_TENSORS = 1 << 20
_DTYPES = ("F32", "F16", "BF16", "F64")
_BUFFERS = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
"""Old checkpoints carry them; they follow from the config."""
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = 4096
"""Rows of a table that are compared at once."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor is: in which file, under which name."""

    file: Path
    name: str
    shape: tuple[int, ...]


class SafetensorsCheckpoint:
    """An opened folder; every shard's header is checked at once, its tensors are mapped when asked for."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._stored = _read_headers(folder)
        self.config = self._tie(config)
        self.files = tuple(dict.fromkeys(stored.file for stored in self._stored.values()))
        if config.architecture in SUPPORTED_ARCHITECTURES:  # others are those of model packages, which name tensors
            shapes = {name: stored.shape for name, stored in self._stored.items()}
            check_promised(shapes, self.config, str(folder))

    @property
    def formats(self) -> Mapping[str, str]:
        """No matrix is in groups."""
        return {}

    def tensors(
        self, keep: Collection[str] = (), target: DequantizeTarget = no_target
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face names with CPU tensors, file by file."""
        for file in self.files:
            with _open(file) as shard:
                for name, stored in self._stored.items():
                    if stored.file == file:
                        yield name, shard.get_tensor(stored.name)

    def release(self) -> None:
        """A file is mapped while its tensors are read, and not longer."""

    def _tie(self, config: ModelConfig) -> ModelConfig:
        """The config as the tables that are stored make it: one that stands for both, or two that differ."""
        if not config.tie_word_embeddings or _HEAD not in self._stored:
            return config
        if _EMBED not in self._stored:  # safetensors.torch.save_model keeps one name of a tensor that has two
            self._stored[_EMBED] = self._stored.pop(_HEAD)
        elif _equal(self._stored[_EMBED], self._stored[_HEAD]):
            del self._stored[_HEAD]
        else:
            return dataclasses.replace(config, tie_word_embeddings=False)
        return config


def _read_headers(folder: Path) -> dict[str, _Stored]:
    """Every tensor of the folder's weights by its name, without buffers. Raises WeightsError, UnsupportedModelError."""
    files, index = _files(folder)
    found: dict[str, _Stored] = {}
    for file in files:
        with _open(file) as shard:
            names = set(shard.keys())
            if missing := sorted(name for name, where in index.items() if where == file and name not in names):
                raise WeightsError(f"the shard lacks {len(missing)} tensors that the index promises", where=str(file),
                                   why=some(missing))  # fmt: skip
            for name in shard.keys():  # noqa: SIM118  (no mapping)
                if name.endswith(_BUFFERS):
                    continue
                part = shard.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise UnsupportedModelError(
                        f"tensor {shown(name)} has dtype {part.get_dtype()}", where=str(file),
                        why="only unquantized weights are served from safetensors",
                    )  # fmt: skip
                stored = _Stored(file, name, tuple(part.get_shape()))
                if name in found and not _equal(found[name], stored):
                    raise WeightsError(f"{brief(name)} is in two files with different values", where=str(folder),
                                       why=f"{found[name].file.name}, {file.name}",
                                       hint="Remove the file that is not part of the model.")  # fmt: skip
                found.setdefault(name, stored)
    return found


def _files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files of the weights, and what the index says of each tensor, which is nothing where the weights are whole.

    A whole file wins over an index: it is what was saved last, or the index would not be beside it.
    """
    index, whole = folder / _INDEX, folder / _WHOLE
    if whole.exists():
        return [whole], {}
    if index.exists():
        where = _read_index(index)
        return sorted(set(where.values())), where
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError("the folder holds no *.safetensors file", where=str(folder))
    if len(files) > 1:
        raise WeightsError(
            f"{len(files)} safetensors files without {_INDEX}", where=str(folder), hint="Fetch the index too."
        )
    return files, {}


def _read_index(index: Path) -> dict[str, Path]:
    """Tensor name -> file. Raises WeightsError."""
    document: Metadata = read_json(index, error=WeightsError)
    if not document.is_section("weight_map"):
        raise WeightsError("not a safetensors index", where=str(index), why="it has no weight_map")
    names = document.section("weight_map")
    shards: dict[str, Path] = {}
    for name in names.keys():  # noqa: SIM118  (no mapping)
        file = names.text(name, most=255)
        if not file or "\0" in file or Path(file).name != file:
            names.refuse(name, "must be the name of a file beside the index", file)
        shards[name] = index.parent / file
    if not shards or len(shards) > _MOST_TENSORS:
        raise WeightsError("not a safetensors index", where=str(index), why=f"it names {len(shards):,} tensors")
    if absent := sorted({file.name for file in shards.values() if not file.exists()}):
        raise WeightsError(
            f"{len(absent)} shards are missing", where=str(index.parent), why=some(absent),
            hint="Fetch the checkpoint again.",
        )  # fmt: skip
    return shards


def _equal(one: _Stored, other: _Stored) -> bool:
    """Whether two stored tensors are the same in shape, dtype and values."""
    if one.shape != other.shape:
        return False
    with _open(one.file) as first, _open(other.file) as second:
        a, b = first.get_slice(one.name), second.get_slice(other.name)
        if a.get_dtype() != b.get_dtype():
            return False
        if not one.shape:
            return torch.equal(first.get_tensor(one.name), second.get_tensor(other.name))
        return all(torch.equal(a[at : at + _ROWS], b[at : at + _ROWS]) for at in range(0, one.shape[0], _ROWS))


def _open(file: Path) -> Any:
    open_regular(file, error=WeightsError).close()
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as e:
        raise WeightsError(
            "not a readable safetensors file", where=str(file), why=brief(e), hint="Fetch it again."
        ) from e
