"""Where the KV of a request is: in the prefix cache, on the host, with a connector; and the moves between them."""

from __future__ import annotations

import typing
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any, Protocol

import numpy as np

from hotplug.core.kv.host import Swapped
from hotplug.core.kv.manager import Prefix
from hotplug.core.scheduler.builder import StepBuilder
from hotplug.core.scheduler.sequence import Fetched, Sequence, Status
from hotplug.core.scheduler.state import SchedulerState
from hotplug.core.transfer.background import Background


class Store(Protocol):
    """What the scheduler needs of a KV connector (`hotplug.core.transfer.connector`)."""

    def contains(self, digest: bytes) -> bool: ...

    def fetch(self, digests: list[bytes]) -> typing.Sequence[Any]: ...


class Residency:
    """What a waiting request need not compute again, and what is kept of one that computed something."""

    def __init__(self, state: SchedulerState, connector: Store | None, background: Background) -> None:
        """`background` runs what the connector fetches."""
        self._state = state
        self._background = background
        self._kv = state.kv
        self._connector = connector
        self._saves: list[tuple[int, bytes]] = []

    def kept(self, seq: Sequence) -> tuple[Prefix, Swapped | None]:
        """What a waiting request need not compute again: its cached prefix, or its KV on the host where that reaches
        further. With the latter goes what of it is cached still."""
        prefix, swapped = self._cached_prefix(seq), seq.swapped
        if swapped is None or prefix.num_blocks * self._kv.block_size >= swapped.num_tokens:
            return prefix, None
        return self._kv.shared(prefix, swapped), swapped

    def _cached_prefix(self, seq: Sequence) -> Prefix:
        """The cached prefix of a waiting request: whole blocks, one token at least left."""
        if not self._kv.enable_prefix_cache or not seq.may_use_cache:
            return self._kv.match(())
        full = (len(seq.token_ids) - 1) // self._kv.block_size
        return self._kv.match(seq.hashes.extend(seq.token_ids, full)[:full])

    def register(self, row: int, num_tokens: int) -> None:
        """Offer the full blocks among a row's first `num_tokens` tokens, whose values are known, to the cache."""
        if self._kv.enable_prefix_cache:
            full = num_tokens // self._kv.block_size
            hashes = self._state.batch.owner(row).hashes
            new = self._kv.register(row, hashes.extend(self._state.batch.history[row], full), full)
            if self._connector is not None:
                self._saves += [(block, digest) for block, digest in new if not self._connector.contains(digest)]

    def begin_fetch(self, seq: Sequence, prefix: Prefix, swapped: Swapped | None) -> bool:
        """Have the connector bring what follows the cached prefix of the next request, if it has it.

        The request then waits for its KV, out of the queue, until `collect` finds that the blocks are there. Once an
        admission: what does not come is computed. Returns whether it waits.
        """
        if self._connector is None or swapped is not None or seq.fetched is not None or not seq.may_use_cache:
            return False
        if len(self._state.arriving) >= self._state.config.max_num_seqs:  # what has come waits in host memory
            return False
        first, full = prefix.num_blocks, (len(seq.token_ids) - 1) // self._kv.block_size
        if first >= full:
            return False
        digests = seq.hashes.extend(seq.token_ids, full)[first:full]
        if not self._connector.contains(digests[0]):
            return False
        self._state.waiting.pop()
        seq.status = Status.WAITING_FOR_KV
        self._state.arriving[self._background.submit(self._connector.fetch, digests)] = seq, first
        return True

    def collect(self) -> None:
        """Put requests whose blocks have come back into the queue, where they were."""
        arriving = self._state.arriving
        for future in [future for future in arriving if future.done()] if arriving else ():
            seq, first = arriving.pop(future)
            if not seq.done:
                seq.fetched = Fetched(first, list(future.result()))
                seq.status = Status.WAITING
                self._state.waiting.push(seq)

    def wait(self, seconds: float) -> None:
        """Return when blocks have come, or after so many seconds: for a loop that has nothing else to do."""
        wait(self._state.arriving, seconds, FIRST_COMPLETED)

    def load(self, seq: Sequence, row: int, first: int, builder: StepBuilder) -> int:
        """Take what was fetched after the first `first` blocks of a row; returns how many tokens that is."""
        fetched, size = seq.fetched, self._kv.block_size
        skipped = 0 if fetched is None else first - fetched.first
        if fetched is None or not 0 <= skipped < len(fetched.blocks):  # the prefix is shorter than it was, or longer
            return 0
        blocks = fetched.blocks[skipped:]
        end = first + len(blocks)
        self._kv.extend(np.array([row], np.int32), np.array([end * size], np.int32))
        builder.loads += zip(self._kv.tables[0].held(row, first, end)[0], blocks, strict=True)
        self._kv.register(row, seq.hashes.digests, end)
        return len(blocks) * size

    def take_saves(self) -> list[tuple[int, bytes]]:
        """Blocks to hand to the connector, with their hashes, before any later step is run."""
        saves, self._saves = self._saves, []
        return saves

    def swap_out(self, seq: Sequence) -> None:
        """Keep a running request's KV on the host, if there is room.

        That is the KV of every token planned so far: steps in flight write theirs before the next plan's copies. So
        of the tokens that the request comes back with, only the last needs computing, or what was left of its prompt.
        """
        if self._kv.host is None:
            return
        row, digests = seq.row, []
        computed = int(self._state.batch.computed[row])
        if self._kv.enable_prefix_cache:
            full = min(computed, int(self._state.batch.known[row])) // self._kv.block_size
            digests = seq.hashes.extend(self._state.batch.history[row], full)[:full]
        seq.swapped = self._kv.swap_out(row, computed, digests)

    def give_back(self, saves: list[tuple[int, bytes]]) -> None:
        """Keep what `take_saves` gave for the next plan."""
        self._saves = saves

    def forget(self, digests: typing.Sequence[bytes]) -> None:
        """Nobody finds the blocks of these hashes any more, and none is given to the connector."""
        self._kv.forget(digests)
        self._saves = [save for save in self._saves if save[1] not in digests]
