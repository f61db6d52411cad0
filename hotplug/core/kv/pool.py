"""The pool of KV blocks: who holds a block, which blocks are free, which free ones still hold a known prefix.

It deals in block ids only. What a block's bytes are, which row uses it and how its hash comes about is
somebody else's business (`tables`, `prefix`). Every operation is O(1) a block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from hotplug.core.errors import ConfigError, OutOfMemoryError

NULL_BLOCK = 0
"""Never allocated: pads block tables and stands for entries behind a sliding window."""


class BlockPool:
    """Reference-counted blocks 1 .. num_blocks - 1.

    A block without references is free, and may still be cached, i.e. found by its hash and shared again. Free
    blocks that hold nothing are allocated first, then cached ones from the least recently released on.
    """

    def __init__(self, num_blocks: int) -> None:
        """`num_blocks` counts the null block. Raises ConfigError when that leaves nothing to allocate."""
        if num_blocks < 2:
            raise ConfigError(f"a KV pool needs at least 2 blocks, got {num_blocks}",
                              why="block 0 is the null block", hint="Raise kv_cache_memory.")  # fmt: skip
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out, cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_usable - len(self._free)

    def references(self, block_id: int) -> int:
        return self._references[block_id]

    def allocate(self, n: int) -> list[int]:
        """`n` blocks with one reference each; evicts cached ones as needed. Raises OutOfMemoryError."""
        if n > len(self._free):
            raise OutOfMemoryError(f"{n} KV blocks asked for, {len(self._free)} free", where="KV block pool",
                                   hint="Raise kv_cache_memory or lower max_num_seqs.")  # fmt: skip
        blocks = [self._free.popitem(last=False)[0] for _ in range(n)]
        for block in blocks:
            self._references[block] = 1
            digest = self._hash_of.pop(block, None)
            if digest is not None:
                del self._block_of[digest]
        return blocks

    def share(self, block_ids: Sequence[int]) -> None:
        """One more reference to each block; a free cached block is in use again."""
        for block in block_ids:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """One reference less to each block of a sequence, given in sequence order.

        The tail is released, and so later evicted, before the head: a prefix without its tail is still worth
        something, a tail without its head nothing. Raises ValueError for a block that nobody holds.
        """
        for block in reversed(block_ids):
            if self._references[block] <= 0:
                raise ValueError(f"KV block {block} is released but has no reference")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def cache(self, block_id: int, digest: bytes) -> None:
        """Make a full block findable by its hash. If another block has this hash already, that one stays."""
        if digest in self._block_of:
            return
        if self._references[block_id] <= 0 or block_id in self._hash_of:
            raise ValueError(f"KV block {block_id} is free or already cached under another hash")
        self._block_of[digest] = block_id
        self._hash_of[block_id] = digest

    def forget(self, digests: Iterable[bytes]) -> None:
        """Nobody finds the blocks of these hashes any more. Who holds one keeps it; free ones are allocated first."""
        for digest in digests:
            block = self._block_of.pop(digest, None)
            if block is not None:
                del self._hash_of[block]
                if self._references[block] == 0:
                    self._free.move_to_end(block, last=False)

    def lookup(self, digest: bytes) -> int | None:
        """The block that holds the tokens of this hash, in use or free."""
        return self._block_of.get(digest)

    def check(self) -> None:
        """Raise AssertionError unless every invariant of the pool holds. O(num_blocks), for tests."""
        held = {b for b, count in enumerate(self._references) if count > 0}
        assert min(self._references) >= 0, "negative reference count"
        assert NULL_BLOCK not in held and NULL_BLOCK not in self._free, "the null block is in circulation"
        assert held.isdisjoint(self._free), "a block is both free and held"
        assert held | self._free.keys() == set(range(1, self.num_blocks)), "a block is lost"
        assert {d: b for b, d in self._hash_of.items()} == self._block_of, "hash index out of step"
        assert NULL_BLOCK not in self._hash_of, "the null block is cached"
