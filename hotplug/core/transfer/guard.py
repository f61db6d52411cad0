"""A connector whose failures cost a prefix and not the engine: what cannot be fetched is computed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from hotplug.core.transfer.connector import KVConnector, KVFormat


class GuardedConnector:
    """Passes calls on to a connector; one that raises, or gives blocks of another shape, is a miss and a warning."""

    def __init__(self, connector: KVConnector, kv_format: KVFormat) -> None:
        self._connector = connector
        self._format = kv_format

    def contains(self, digest: bytes) -> bool:
        try:
            return self._connector.contains(digest)
        except Exception as e:
            self._warn("contains", e)
            return True  # so that nothing is copied for it

    def fetch(self, digests: Sequence[bytes]) -> Sequence[Tensor]:
        try:
            return self._checked(self._connector.fetch(digests)[: len(digests)])
        except Exception as e:
            self._warn("fetch", e)
            return ()

    def _checked(self, blocks: Sequence[Tensor]) -> Sequence[Tensor]:
        """The leading blocks that are of the engine's format."""
        for i, block in enumerate(blocks):
            if tuple(block.shape) != self._format.block_shape or block.dtype != self._format.dtype:
                self._warn("fetch", ValueError(f"a block of shape {list(block.shape)}, {block.dtype}"))
                return blocks[:i]
        return blocks

    def store(self, digest: bytes, block: Tensor) -> None:
        try:
            self._connector.store(digest, block)
        except Exception as e:
            self._warn("store", e)

    def _warn(self, call: str, error: Exception) -> None:
        name = type(self._connector).__name__
        warnings.warn(f"KV connector {name}: {call} failed: {type(error).__name__}: {error}", stacklevel=3)
