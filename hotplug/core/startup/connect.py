"""An engine's KV connector: made for the format of its blocks, and joined to its caches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from torch import Tensor

from hotplug.core.errors import FeatureError
from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.platform.optional import HasKV, HasRuntime
from hotplug.core.startup.bind import Bound
from hotplug.core.transfer.background import Background
from hotplug.core.transfer.blocks import BlockTransfer
from hotplug.core.transfer.connector import KVConnector, KVFormat
from hotplug.core.transfer.guard import GuardedConnector

PIECES, PIECE = 256, 4096
"""How much of a file its fingerprint looks at: a megabyte, so that a start does not wait for it."""


def make_connector(bound: Bound) -> KVConnector | None:
    """What keeps blocks elsewhere, if anything does. Needs no weights. Raises FeatureError, ConfigError."""
    if bound.connector is None:
        return None
    groups = bound.kv.groups
    if groups.free_blocks_early or groups.num_tables > 1 or not groups.cacheable:
        kinds = ", ".join(f"{group.spec.kind} ({len(group.layers)} layers)" for group in groups.groups)
        raise FeatureError("a KV connector serves models with one group of KV blocks that keeps all of them",
                           why=f"this one has {kinds}", hint="Leave out --kv-connector.")  # fmt: skip
    kv_format = block_format(bound)
    return GuardedConnector(bound.connector(kv_format), kv_format)


def make_transfer(
    bound: Bound, kv: list[KVBlocks], connector: KVConnector | None, background: Background
) -> BlockTransfer | None:
    """What moves blocks between the caches and the connector, whose work is done in the `background`."""
    if connector is None:
        return None
    platform = bound.placement.platform
    if isinstance(platform, HasKV):  # its copies wait for the device
        return BlockTransfer(kv, connector, block_format(bound), platform.copy, background)
    runtime = platform if isinstance(platform, HasRuntime) else None
    return BlockTransfer(kv, connector, block_format(bound), _copy if runtime is None else _queue, background, runtime)


def block_format(bound: Bound) -> KVFormat:
    """The format of an engine's blocks. The namespace follows from all that their contents do, kernels apart."""
    config, resolved = bound.config, bound.options.resolved
    facts = {
        "model": dataclasses.asdict(bound.checkpoint.config),
        "weights": [fingerprint(file) for file in bound.checkpoint.files],
        "drawn": [config.seed, str(bound.placement.limits.dtypes)] if config.load_format == "dummy" else None,
        "quantization": config.quantization,
        "dtype": resolved.dtype,
        "kv": [resolved.kv_dtype, str(resolved.kv_layout), resolved.block_size],
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    namespace = hashlib.sha256(text.encode()).hexdigest()[:32]
    return KVFormat(namespace, bound.kv.one_block, bound.kv.dtype)


def fingerprint(file: Path) -> str:
    """Of a file's size and of pieces all over it: files of weights that differ at all differ in most places."""
    size = file.stat().st_size
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    with file.open("rb") as f:
        for i in range(PIECES):
            f.seek(i * max(size - PIECE, 0) // (PIECES - 1))
            digest.update(f.read(PIECE))
    return digest.hexdigest()


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


def _queue(source: Tensor, target: Tensor) -> None:
    target.copy_(source, non_blocking=True)
