"""A Hugging Face folder of safetensors, whole or in shards, as a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hotplug.core.errors import UnsupportedModelError, WeightsError
from hotplug.core.weights.config import ModelConfig
from hotplug.core.weights.room import Room, no_room

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_DTYPES = ("F32", "F16", "BF16", "F64")
_BUFFERS = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
"""Old checkpoints carry them; they follow from the config."""


class SafetensorsCheckpoint:
    """An opened folder; every shard's header is checked at once, its tensors are mapped when asked for."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.config = config
        self._where = _shards(folder)
        self.files = tuple(dict.fromkeys(self._where.values()))
        self._check()

    @property
    def formats(self) -> Mapping[str, str]:
        """No matrix is in groups."""
        return {}

    def tensors(self, keep: Collection[str] = (), room: Room = no_room) -> Iterator[tuple[str, torch.Tensor]]:
        """Names as stored with CPU tensors, file by file."""
        for file in self.files:
            with _open(file) as shard:
                for name in [n for n, f in self._where.items() if f == file and not n.endswith(_BUFFERS)]:
                    yield name, shard.get_tensor(name)

    def release(self) -> None:
        """A file is mapped while its tensors are read, and not longer."""

    def _check(self) -> None:
        for file in self.files:
            promised = {name for name, where in self._where.items() if where == file}
            with _open(file) as shard:
                if missing := sorted(promised - set(shard.keys())):
                    raise WeightsError(
                        f"the shard lacks {len(missing)} tensors that the index promises",
                        where=str(file),
                        why=", ".join(missing[:3]),
                    )
                for name in promised:
                    dtype = shard.get_slice(name).get_dtype()
                    if dtype not in _DTYPES and not name.endswith(_BUFFERS):
                        raise UnsupportedModelError(
                            f"tensor {name!r} has dtype {dtype}", where=str(file),
                            why="only unquantized weights are served from safetensors",
                        )  # fmt: skip


def _shards(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index, or from the only safetensors file there is."""
    index = folder / _INDEX
    if index.exists():
        return _read_index(index)
    files = sorted(folder.glob("*.safetensors"))
    whole = folder / _WHOLE
    if not files:
        raise WeightsError("the folder holds no *.safetensors file", where=str(folder))
    if len(files) > 1 and whole not in files:
        raise WeightsError(
            f"{len(files)} safetensors files without {_INDEX}", where=str(folder), hint="Fetch the index too."
        )
    file = whole if whole in files else files[0]
    with _open(file) as opened:
        return dict.fromkeys(opened.keys(), file)


def _read_index(index: Path) -> dict[str, Path]:
    try:
        names = json.loads(index.read_bytes())["weight_map"]
        shards = {str(name): index.parent / Path(file).name for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise WeightsError("not a safetensors index", where=str(index), why=repr(e)) from e
    if absent := sorted({file.name for file in shards.values() if not file.exists()}):
        raise WeightsError(
            f"{len(absent)} shards are missing", where=str(index.parent), why=", ".join(absent),
            hint="Fetch the checkpoint again.",
        )  # fmt: skip
    return shards


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as e:
        raise WeightsError(
            "not a readable safetensors file", where=str(file), why=str(e), hint="Fetch it again."
        ) from e
