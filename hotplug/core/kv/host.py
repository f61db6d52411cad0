"""KV blocks in host memory, where preempted sequences wait: who holds one, and what must still be copied there.

It deals in block ids only; the memory behind them is the runner's (`hotplug.core.transfer.swap`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hotplug.core.kv.pool import BlockPool


@dataclass(frozen=True, slots=True)
class Swapped:
    """The KV of one sequence on the host."""

    num_tokens: int
    """Leading tokens of the sequence whose KV this is."""
    firsts: tuple[int, ...]
    """By group: the first block-table entry kept; those before are behind the window."""
    pages: list[int]
    """Host pages of the entries from there on: by group, by table, in order of the entries."""


class HostPool:
    """Reference-counted host blocks 1 .. num_blocks - 1 (block 0 is the null block, as on the device).

    A block with a hash stays findable after its release, until it is allocated anew: a sequence that is swapped out
    again, or one that shares its prefix, copies only what the host has not.
    """

    def __init__(self, num_blocks: int) -> None:
        """`num_blocks` counts the null block. Raises ConfigError when that leaves nothing to allocate."""
        self.blocks = BlockPool(num_blocks)
        self._copies: dict[int, int] = {}  # by host block, so that one given away anew is not written twice in a step

    def store(self, device_blocks: Sequence[int], digests: Sequence[bytes | None]) -> list[int] | None:
        """Host blocks for the contents of `device_blocks`, one reference each; None, and nothing taken, without room.

        `digests` are the blocks' hashes, None for a block that has none. The contents are copied by the next plan
        (`take_copies`), so until then the device blocks may be freed but not written.
        """
        found = [None if digest is None else self.blocks.lookup(digest) for digest in digests]
        kept = [block for block in found if block is not None]
        missing = len(found) - len(kept)
        if missing > self.blocks.num_free - sum(self.blocks.references(block) == 0 for block in kept):
            return None
        self.blocks.share(kept)
        fresh = iter(self.blocks.allocate(missing))
        held = []
        for device_block, digest, block in zip(device_blocks, digests, found, strict=True):
            if block is None:
                block = next(fresh)
                self._copies[block] = device_block
                if digest is not None:
                    self.blocks.cache(block, digest)
            held.append(block)
        return held

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each. What a plan made earlier copies from them is copied before they are reused."""
        self.blocks.release(blocks)

    def take_copies(self) -> list[tuple[int, int]]:
        """(device block, host block) of the copies that no plan has yet, each host block once."""
        copies, self._copies = self._copies, {}
        return [(device_block, block) for block, device_block in copies.items()]
