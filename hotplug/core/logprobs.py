"""Log-probabilities: of one position as an object, of a prompt in columns.

A prompt may have a hundred thousand positions. In columns they are gathered over its chunks, checked and sent as three
pieces of memory; objects are made where they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, overload

import msgspec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_ITEM = 4
"""Bytes of a value."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: the chosen token first, then the most likely ones, best first."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """Rank of the chosen token in the distribution, 1 = most likely."""


class Columns(NamedTuple):
    """Of n consecutive positions, each with its chosen token and the k most likely ones: `TokenLogprobs` in arrays."""

    token_ids: npt.NDArray[np.int32]
    """[n, 1 + k]"""
    logprobs: npt.NDArray[np.float32]
    """[n, 1 + k]"""
    ranks: npt.NDArray[np.int32]
    """[n]"""


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """One entry a prompt token, to be read like a sequence; the first is None, as nothing comes before it."""

    token_ids: bytes
    """[n - 1, 1 + k] int32"""
    logprobs: bytes
    """[n - 1, 1 + k] float32"""
    ranks: bytes
    """[n - 1] int32"""

    def __len__(self) -> int:
        return 1 + len(self.ranks) // _ITEM

    @overload
    def __getitem__(self, index: int) -> TokenLogprobs | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenLogprobs | None]: ...
    def __getitem__(self, index: int | slice) -> TokenLogprobs | list[TokenLogprobs | None] | None:
        """As of a list."""
        if isinstance(index, slice):
            return list(self)[index]
        position = range(len(self))[index]
        if position == 0:
            return None
        ids, logprobs, ranks = self.columns
        return TokenLogprobs(ids[position - 1].tolist(), logprobs[position - 1].tolist(), int(ranks[position - 1]))

    def __iter__(self) -> Iterator[TokenLogprobs | None]:
        yield None
        ids, logprobs, ranks = self.columns
        yield from map(TokenLogprobs, ids.tolist(), logprobs.tolist(), ranks.tolist())

    @property
    def columns(self) -> Columns:
        """All entries but the first."""
        import numpy as np  # messages load without it

        ranks = np.frombuffer(self.ranks, np.int32)
        shape = (len(ranks), -1) if len(ranks) else (0, 1)
        return Columns(
            np.frombuffer(self.token_ids, np.int32).reshape(shape),
            np.frombuffer(self.logprobs, np.float32).reshape(shape),
            ranks,
        )


class PromptScores:
    """Gathers the log-probabilities of a prompt of `num_tokens` over its chunks, `top` alternatives a position."""

    def __init__(self, num_tokens: int, top: int) -> None:
        import numpy as np

        shape = (num_tokens - 1, 1 + top)
        self._columns = Columns(
            np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(num_tokens - 1, np.int32)
        )

    def put(self, start: int, chunk: Columns) -> None:
        """Keep those of prompt tokens start + 1 ..; what is past the prompt is dropped. A chunk may come again."""
        for whole, part in zip(self._columns, chunk, strict=True):
            end = min(start + len(part), len(whole))
            whole[start:end] = part[: end - start]

    @property
    def are_numbers(self) -> bool:
        """Whether the chosen tokens' log-probabilities are."""
        chosen = self._columns.logprobs[:, 0]
        return bool((chosen == chosen).all())  # NaN alone is not itself

    def sent(self) -> PromptLogprobs:
        return PromptLogprobs(*(column.tobytes() for column in self._columns))
