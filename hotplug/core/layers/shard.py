"""Destinations for one rank's part of a checkpoint tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from hotplug.core.layers.destination import Destination
from hotplug.core.quant.packed_scheme import PackedRows
from hotplug.core.weights.packed_matrix import PackedMatrix


def shard(target: Destination, dim: int, rank: int, ranks: int) -> Destination:
    """Destination of a tensor of which `target` takes part number `rank` of `ranks` equal ones along `dim`."""
    if isinstance(target, PackedRows):
        return PackedShard(target, dim, rank, ranks)
    return Shard(target, dim, rank, ranks)


def _whole(part: torch.Size, dim: int, ranks: int) -> torch.Size:
    return torch.Size(size * ranks if at == dim else size for at, size in enumerate(part))


class Shard:
    """Keeps a part of the tensor that it is given (`hotplug.core.layers.destination.Destination`)."""

    def __init__(self, target: Destination, dim: int, rank: int, ranks: int) -> None:
        self._target = target
        self._dim, self._rank = dim, rank
        self.shape = _whole(target.shape, dim, ranks)
        self.dtype = target.dtype
        self.device = target.device

    def copy_(self, source: Tensor, /) -> None:
        size = self._target.shape[self._dim]
        self._target.copy_(source.narrow(self._dim, self._rank * size, size))


class PackedShard(PackedRows):
    """`Shard` of a matrix in groups. Columns are those of whole groups."""

    def __init__(self, target: PackedRows, dim: int, rank: int, ranks: int) -> None:
        self._target = target
        self._dim, self._rank = dim, rank
        self.shape = _whole(target.shape, dim, ranks)
        self.scheme, self.dtype, self.device = target.scheme, target.dtype, target.device

    def copy_(self, source: Tensor, /) -> None:
        size = self._target.shape[self._dim]
        self._target.copy_(source.narrow(self._dim, self._rank * size, size))

    def take(self, matrix: PackedMatrix) -> None:
        part = self._target.shape
        size = matrix.data.shape[self._dim] * part[self._dim] // matrix.shape[self._dim]
        data = matrix.data.narrow(self._dim, self._rank * size, size)
        self._target.take(PackedMatrix(matrix.scheme, data.contiguous(), part))


class OnFirstRank:
    """Keeps the tensor on rank 0 and zeros on all others: it is added to a sum once."""

    def __init__(self, target: Destination, rank: int) -> None:
        self._target = target
        self._rank = rank
        self.shape = target.shape
        self.dtype = target.dtype
        self.device = target.device

    def copy_(self, source: Tensor, /) -> None:
        self._target.copy_(source if self._rank == 0 else torch.zeros_like(source))
