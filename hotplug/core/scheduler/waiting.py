"""The queue of requests that have no row: best key first, removal by id."""

from __future__ import annotations

import heapq

from hotplug.core.scheduler.sequence import Key, Sequence


class WaitingQueue:
    """A heap ordered by `Sequence.key`; push and pop are O(log n), removal O(1) with the entry dropped later.

    The key is the policy's rank, then the order of arrival. A preempted request keeps its key, so it stands
    before all of its rank that came after it.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Key, Sequence]] = []
        self._members: dict[str, Sequence] = {}
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._members)

    def tokens_of(self, requests: int) -> int:
        """About how many prompt tokens so many of the waiting requests have: their share of all."""
        waiting = len(self._members)
        return self._tokens * min(requests, waiting) // waiting if waiting else 0

    def push(self, seq: Sequence) -> None:
        heapq.heappush(self._heap, (seq.key, seq))
        self._members[seq.request.id] = seq
        self._tokens += seq.num_prompt

    def peek(self) -> Sequence | None:
        """The best request, or None."""
        while self._heap and not self._is_member(self._heap[0][1]):
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        """Take the best request out. Raises IndexError when empty."""
        if self.peek() is None:
            raise IndexError("pop from an empty waiting queue")
        seq = heapq.heappop(self._heap)[1]
        self._forget(seq)
        return seq

    def remove(self, seq: Sequence) -> None:
        """Take a waiting request out from anywhere in the queue. Raises KeyError when it does not wait."""
        self._forget(seq)
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._members):
            self._heap = [entry for entry in self._heap if self._is_member(entry[1])]
            heapq.heapify(self._heap)

    def _forget(self, seq: Sequence) -> None:
        del self._members[seq.request.id]
        self._tokens -= seq.num_prompt

    def _is_member(self, seq: Sequence) -> bool:
        return self._members.get(seq.request.id) is seq
