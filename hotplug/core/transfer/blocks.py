"""Copying KV blocks between the caches on the device and host tensors, for a connector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.transfer.connector import KVConnector, KVFormat

Copy = Callable[[Tensor, Tensor], object]
"""`copy(source, target)`, between device and host, either way."""


class BlockTransfer:
    """Moves the blocks of `kv`, one (keys, values) pair a layer."""

    def __init__(self, kv: list[KVBlocks], connector: KVConnector, kv_format: KVFormat, copy: Copy) -> None:
        self._kv = kv
        self._connector = connector
        self._format = kv_format
        self._copy = copy

    def save(self, blocks: Sequence[tuple[int, bytes]]) -> None:
        """Give blocks, by id and hash, to the connector. Waits for the device."""
        for block, digest in blocks:
            if not self._connector.contains(digest):
                host = torch.empty(self._format.block_shape, dtype=self._format.dtype)
                for layer, caches in enumerate(self._kv):
                    for side, cache in enumerate(caches):
                        self._copy(cache[block], host[layer, side])
                self._connector.store(digest, host)

    def load(self, blocks: Sequence[tuple[int, Tensor]]) -> None:
        """Write fetched blocks to their places."""
        for block, host in blocks:
            for layer, caches in enumerate(self._kv):
                for side, cache in enumerate(caches):
                    self._copy(host[layer, side], cache[block])
