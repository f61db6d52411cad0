"""A KV connector that keeps blocks as files in a folder: a second engine finds what the first one computed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hotplug.plugins import ConfigError, KVFormat


class FolderConnector:
    """A file a block, in a folder a namespace. Files are moved into place whole, so engines may share a folder."""

    def __init__(self, argument: str, kv_format: KVFormat) -> None:
        if not argument:
            raise ConfigError("the connector needs a folder", where="--kv-connector", hint="Write folder:PATH.")
        self._folder = Path(argument) / kv_format.namespace
        self._folder.mkdir(parents=True, exist_ok=True)
        self._format = kv_format

    def contains(self, digest: bytes) -> bool:
        return self._file(digest).exists()

    def fetch(self, digests: Sequence[bytes]) -> Sequence[Tensor]:
        blocks = []
        for digest in digests:
            if not self.contains(digest):
                break
            raw = torch.frombuffer(bytearray(self._file(digest).read_bytes()), dtype=torch.uint8)
            blocks.append(raw.view(self._format.dtype).view(self._format.block_shape))
        return blocks

    def store(self, digest: bytes, block: Tensor) -> None:
        part = self._file(digest).with_suffix(f".{os.getpid()}")
        part.write_bytes(block.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        part.replace(self._file(digest))

    def _file(self, digest: bytes) -> Path:
        return self._folder / f"{digest.hex()}.kv"
