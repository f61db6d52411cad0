"""Ranks of an engine that compute something together, as one of them sees them: what a collective is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload


@dataclass(frozen=True, slots=True)
class RankGroup(Sequence[int]):
    """A named group of ranks. As a sequence it is `ranks`, which is what platforms of interface 1.0 were given."""

    name: str
    """The axis of the mesh that it lies along: "tp" splits layers over its ranks."""
    ranks: tuple[int, ...]
    """The ranks of the engine that are in it, in the order in which a gather puts their parts."""
    rank: int
    """The rank of this process in the engine; it is in `ranks`."""

    @property
    def size(self) -> int:
        """How many ranks are in it."""
        return len(self.ranks)

    @property
    def position(self) -> int:
        """Where this process is in `ranks`: which part of a split tensor it has."""
        return self.ranks.index(self.rank)

    def __len__(self) -> int:
        return len(self.ranks)

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[int, ...]: ...
    def __getitem__(self, at: int | slice) -> int | tuple[int, ...]:
        return self.ranks[at]
