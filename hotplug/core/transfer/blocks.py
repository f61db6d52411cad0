"""Copying KV blocks between the caches on the device and host tensors, for a connector."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

import torch
from torch import Tensor

from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.platform.optional import HasRuntime
from hotplug.core.transfer.background import Background
from hotplug.core.transfer.connector import KVConnector, KVFormat

_logger = logging.getLogger(__name__)

Copy = Callable[[Tensor, Tensor], object]
"""`copy(source, target)`, between device and host, either way."""
MOST_PENDING = 256
"""Blocks that wait to be stored at most. Others are not kept: a slow connector must not fill the host's memory."""


class BlockTransfer:
    """Moves the blocks of `kv`, the tensors of each lane. What is filled is stored in the background.

    `runtime` says when a copy that does not wait has arrived; without one, `copy` waits for the device.
    """

    def __init__(
        self,
        kv: list[KVBlocks],
        connector: KVConnector,
        kv_format: KVFormat,
        copy: Copy,
        background: Background,
        runtime: HasRuntime | None = None,
    ) -> None:
        self._kv = kv
        self._connector = connector
        self._format = kv_format
        self._copy = copy
        self._background = background
        self._runtime = runtime
        self._pending: dict[bytes, Future[None]] = {}
        """By hash: blocks that wait to be stored, or are being stored."""
        self.dropped = 0
        """Blocks that were not kept because too many were waiting."""

    def save(self, blocks: Sequence[tuple[int, bytes]]) -> None:
        """Copy blocks, by id and hash, to the host, from where they go to the connector in the background."""
        if not blocks:
            return
        self._pending = {digest: future for digest, future in self._pending.items() if not future.done()}
        wanted = [(b, d) for b, d in blocks if d not in self._pending and not self._connector.contains(d)]
        kept = wanted[: max(MOST_PENDING - len(self._pending), 0)]
        if len(kept) < len(wanted):
            if not self.dropped:
                _logger.warning("the KV connector is slower than blocks fill: some are not kept")
            self.dropped += len(wanted) - len(kept)
        copied = [(digest, self._to_host(block)) for block, digest in kept]
        event = None
        if self._runtime is not None and copied:
            event = self._runtime.event()
            event.record()
        for digest, host in copied:
            self._pending[digest] = self._background.submit(self._store, event, digest, host)

    def load(self, blocks: Sequence[tuple[int, Tensor]]) -> None:
        """Write fetched blocks to the caches."""
        for block, host in blocks:
            for lane, caches in enumerate(self._kv):
                for side, cache in enumerate(caches):
                    self._copy(host[lane, side], cache[block])

    def wait(self) -> None:
        """Return once the connector has all blocks that were saved."""
        wait(self._pending.values())

    def _to_host(self, block: int) -> Tensor:
        shape, dtype = self._format.block_shape, self._format.dtype
        host = torch.empty(shape, dtype=dtype) if self._runtime is None else self._runtime.pinned(shape, dtype)
        for lane, caches in enumerate(self._kv):
            for side, cache in enumerate(caches):
                self._copy(cache[block], host[lane, side])
        return host

    def _store(self, event: object, digest: bytes, host: Tensor) -> None:
        if event is not None:
            event.synchronize()  # type: ignore[attr-defined]
        self._connector.store(digest, host)
