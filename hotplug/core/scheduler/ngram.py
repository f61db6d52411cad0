"""Prompt lookup: what may follow is what followed the same tokens before, in the request's own text (Saxena, 2023).

The index knows where each n-gram of the shortest length ends; longer matches are found among those by comparing
backwards, so that one index serves all lengths. The prompt is indexed at once with NumPy, later tokens as they come.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hotplug.core.scheduler.plan import IntArray

_BULK = 64
"""New n-grams from which on sorting them is faster than a dictionary entry each."""
_FACTOR = np.int64(6364136223846793005)
"""Odd and large: an n-gram's key is its tokens as digits of this base, in 64 bits. Matches are compared, so that keys
need not be unique."""


class NgramIndex:
    """Where the n-grams of one growing sequence end.

    The sequence is an int32 array whose leading tokens never change; every call gets it anew, since it may move.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        """Lengths of the n-grams that count as a match, `1 <= shortest <= longest`."""
        self._shortest = shortest
        self._longest = longest
        self._next = shortest
        """The first end that is not indexed. An end is the position after an n-gram."""
        self._keys: npt.NDArray[np.int64] = np.empty(0, np.int64)
        """Of what was indexed in bulk: sorted keys, and the end of each, ascending within a key."""
        self._ends: IntArray = np.empty(0, np.int32)
        self._later: dict[int, list[int]] = {}
        """By key: ends that came after those, ascending."""

    def find(self, tokens: IntArray) -> tuple[int, int] | None:
        """The most recent earlier occurrence of the longest n-gram that `tokens` [n] end with.

        Returns (its end, its length), or None where not even the shortest n-gram occurred before.
        """
        n = len(tokens)
        if n <= self._shortest:
            return None
        self._add(tokens[:-1])
        found = self._candidates(int(_keys(tokens[n - self._shortest :], self._shortest)[0]))
        if found is None:
            return None
        length = 0
        while length < self._longest:
            # An occurrence may begin with the sequence: it has no token before that.
            within = found[found > length]
            longer = within[tokens[within - (length + 1)] == tokens[n - 1 - length]]
            if not longer.size:
                break
            found, length = longer, length + 1
        return (int(found[-1]), length) if length >= self._shortest else None

    def _candidates(self, key: int) -> IntArray | None:
        """Ends of the n-grams with a key, ascending; None where there are none."""
        later = self._later.get(key)
        low = int(self._keys.searchsorted(key))
        if low == len(self._keys) or self._keys[low] != key:
            return None if later is None else np.array(later, np.int32)
        early = self._ends[low : self._keys.searchsorted(key, "right")]
        return early if later is None else np.concatenate((early, np.array(later, np.int32)))

    def _add(self, tokens: IntArray) -> None:
        """Index the n-grams that end within `tokens` and are not indexed yet."""
        first, end = self._next, len(tokens)
        if end < first:
            return
        keys = _keys(tokens[first - self._shortest :], self._shortest)
        self._next = end + 1
        if len(keys) >= _BULK and not self._keys.size and not self._later:
            order = np.argsort(keys, kind="stable")
            self._keys, self._ends = keys[order], (order + first).astype(np.int32)
            return
        for i, key in enumerate(keys.tolist()):
            self._later.setdefault(key, []).append(first + i)


def continuation(tokens: IntArray, end: int, count: int) -> IntArray:
    """`count` tokens that follow if those at [end, n) come again: after the last of them, the first once more."""
    return tokens[end + np.arange(count) % (len(tokens) - end)]


def _keys(tokens: IntArray, n: int) -> npt.NDArray[np.int64]:
    """Keys of all n-grams of `tokens`, in order."""
    count = len(tokens) - n + 1
    keys = tokens[:count].astype(np.int64)
    for i in range(1, n):
        keys = keys * _FACTOR + tokens[i : i + count]
    return keys
