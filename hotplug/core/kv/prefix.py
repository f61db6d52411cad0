"""Chained hashes of full KV blocks: equal hash means equal tokens from the start of the sequence on.

The hash of block i covers its own tokens and, through its parent's hash, all before it and the salt. This
module computes hashes; `pool` remembers which block holds which.
"""

from __future__ import annotations

import hashlib

from hotplug.core.kv.spec import IntArray

DIGEST_BYTES = 16


class BlockHashes:
    """The block hashes of one growing sequence, computed as blocks fill up.

    `salt` separates sequences whose equal tokens do not mean equal KV (tenants).
    """

    __slots__ = ("_block_size", "_parent", "digests")

    def __init__(self, block_size: int, salt: str = "") -> None:
        self._block_size = block_size
        # The root has another length than any parent digest plus tokens, so a salt cannot imitate a prefix.
        self._parent = hashlib.blake2b(salt.encode(), digest_size=DIGEST_BYTES, person=b"hotplug-kv").digest()
        self.digests: list[bytes] = []
        """One 16-byte digest for each full block so far."""

    def extend(self, token_ids: IntArray, num_blocks: int) -> list[bytes]:
        """Digests of at least the first `num_blocks` blocks of the sequence `token_ids` ([num_tokens] int32).

        Blocks hashed before are not looked at again. Returns `digests`.
        """
        first = len(self.digests)
        if num_blocks > first:
            size = self._block_size
            data = token_ids[first * size : num_blocks * size].tobytes()
            step = size * token_ids.itemsize
            for offset in range(0, len(data), step):
                self._parent = hashlib.blake2b(
                    self._parent + data[offset : offset + step], digest_size=DIGEST_BYTES
                ).digest()
                self.digests.append(self._parent)
        return self.digests
