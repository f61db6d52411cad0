"""Opening a checkpoint: one interface over safetensors folders, GGUF files and random weights.

What a checkpoint is found by is its content. Where it comes from is `source`'s business; what becomes of the
tensors is the model's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from hotplug.core.errors import ConfigError, UnsupportedModelError, WeightsError, nearest
from hotplug.core.weights.config import ModelConfig
from hotplug.core.weights.dequantize_target import DequantizeTarget, no_target
from hotplug.core.weights.hf_config import SUPPORTED_ARCHITECTURES, ConfigReader, read_hf_config
from hotplug.core.weights.metadata import open_regular, read_json

if TYPE_CHECKING:
    import torch

    from hotplug.core.weights.packed_matrix import PackedMatrix

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
_ADAPTER = "adapter_config.json"
_PART_OF_GGUF = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


class Checkpoint(Protocol):
    """Weights under Hugging Face names and shapes, and the config that they belong to."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def formats(self) -> Mapping[str, str]:
        """The format of each matrix by name, in lower case, where matrices may be in groups; else nothing."""
        ...

    def tensors(
        self, keep: Collection[str] = (), target: DequantizeTarget = no_target
    ) -> Iterator[tuple[str, torch.Tensor | PackedMatrix]]:
        """Name and CPU tensor of each weight, one in memory at a time. Raises WeightsError.

        Matrices in groups whose names are in `keep` come as they are stored, all others in floating point. What has to
        be dequantized is written to the tensor that `target` has for it, and is that tensor.
        """
        ...

    def release(self) -> None:
        """Give back memory that reading has left mapped; tensors that `tensors` gave stay good."""
        ...


def open_checkpoint(
    path: Path,
    load_format: str = "auto",
    seed: int = 0,
    architectures: Collection[str] = SUPPORTED_ARCHITECTURES,
    readers: Mapping[str, ConfigReader] = MappingProxyType({}),
) -> Checkpoint:
    """The checkpoint at `path`: a folder with config.json and *.safetensors, or a GGUF file (or its folder).

    `load_format` "auto" goes by content; "dummy" needs only config.json or a GGUF's metadata and draws the
    weights from `seed`. Headers are checked here, values are read by `tensors()`. Raises ConfigError,
    WeightsError, UnsupportedModelError (an architecture not in `architectures`). `readers` are those of model
    packages.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"unknown load format {load_format!r}", hint=nearest(load_format, LOAD_FORMATS))
    _check_there(path)
    if load_format == "dummy":
        return _open_dummy(path, seed, architectures, readers)
    gguf_file = find_gguf(path) if load_format in ("auto", "gguf") else None
    if load_format == "gguf" or (gguf_file and not _has_safetensors(path)):
        if gguf_file is None:
            raise WeightsError("the folder holds no *.gguf file", where=str(path))
        from hotplug.core.weights.gguf import GgufCheckpoint

        return GgufCheckpoint(gguf_file)
    if path.is_file():
        raise WeightsError(
            "a single file is read only as GGUF",
            where=str(path),
            hint="For safetensors, give the folder that also holds config.json.",
        )
    from hotplug.core.weights.safetensors import SafetensorsCheckpoint

    return SafetensorsCheckpoint(path, read_hf_config(path, architectures, readers))


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is or, for a folder, holds; None without one. Raises WeightsError for several."""
    if not path.is_dir():
        with open_regular(path, error=WeightsError) as file:
            return path if path.suffix == ".gguf" or file.read(4) == b"GGUF" else None
    found = sorted(path.glob("*.gguf"))
    if any(_PART_OF_GGUF.search(file.name) for file in found):
        raise UnsupportedModelError(f"a GGUF split into {len(found)} files is not read", where=str(path),
                                    why=", ".join(file.name for file in found[:3]),
                                    hint="Join the parts with llama-gguf-split --merge.")  # fmt: skip
    if len(found) > 1:
        raise WeightsError(
            f"the folder holds {len(found)} GGUF files",
            where=str(path),
            why=", ".join(file.name for file in found),
            hint="Name one of them.",
        )
    return found[0] if found else None


def _check_there(path: Path) -> None:
    """Refuse what is not there, or holds an adapter to a model instead of one."""
    try:
        path.stat()
        adapter = path.is_dir() and (path / _ADAPTER).exists()
    except (OSError, ValueError) as e:
        raise WeightsError("cannot read it", where=str(path), why=getattr(e, "strerror", None) or str(e)) from e
    if not adapter:
        return
    base = read_json(path / _ADAPTER).text("base_model_name_or_path", "", most=1000)
    raise UnsupportedModelError(
        f"it holds a LoRA adapter{f' to {base}' if base else ''}, and adapters are not built",
        where=str(path / _ADAPTER),
        hint="Merge it into its model (peft: merge_and_unload, save_pretrained) and serve that folder; "
        f"if this folder is the merged one, remove {_ADAPTER}.",
    )


def _open_dummy(
    path: Path, seed: int, architectures: Collection[str], readers: Mapping[str, ConfigReader]
) -> Checkpoint:
    from hotplug.core.weights.dummy import DummyCheckpoint

    config_file = path if path.is_file() else path / "config.json"
    if config_file.suffix == ".json" and config_file.exists():
        return DummyCheckpoint(read_hf_config(config_file.parent, architectures, readers), (config_file,), seed)
    gguf_file = find_gguf(path)
    if gguf_file is None:
        raise WeightsError("neither config.json nor a GGUF file to take the shapes from", where=str(path))
    from hotplug.core.weights.gguf_config import gguf_config
    from hotplug.core.weights.gguf_file import GgufFile

    return DummyCheckpoint(gguf_config(GgufFile(gguf_file)), (gguf_file,), seed)


def _has_safetensors(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.safetensors"))
