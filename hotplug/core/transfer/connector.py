"""KV connectors: full KV blocks kept outside of the engine, found again by the hash of the tokens before them.

A block's hash covers its own tokens and all before it (`hotplug.core.kv.prefix`), so equal hash means equal contents
under one `KVFormat.namespace`. The scheduler asks `contains` on the engine's loop; `fetch` and `store` run in
a thread beside it (`background`), one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVFormat:
    """What the blocks of an engine are."""

    namespace: str
    """Equal only for engines whose blocks of equal hash are equal: model, weights, dtypes, layout, block size."""
    block_shape: tuple[int, ...]
    """[layers, 2, ...]: keys and values of every layer, in the cache's layout."""
    dtype: torch.dtype


class KVConnector(Protocol):
    """Keeps blocks, for as long as it likes."""

    def contains(self, digest: bytes) -> bool:
        """Whether the block of this 16-byte hash is kept. Asked on the engine's loop, so it must not block."""
        ...

    def fetch(self, digests: Sequence[bytes]) -> Sequence[Tensor]:
        """Host tensors (`KVFormat.block_shape`) of the leading ones of these blocks, as many as there are.

        Called in a thread of the engine's own and may block; the request waits, and nobody else does.
        """
        ...

    def store(self, digest: bytes, block: Tensor) -> None:
        """Take a block, a host tensor that is the connector's from now on. Called in the same thread as `fetch`."""
        ...


Factory = Callable[[str, KVFormat], KVConnector]
"""`factory(argument, format)`, with what `--kv-connector NAME:ARGUMENT` says; raises ConfigError."""
