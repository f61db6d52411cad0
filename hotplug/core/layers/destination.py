"""Where a checkpoint tensor goes: a parameter, a slice of one, or what a layer makes of it on arrival."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Destination(Protocol):
    """What loading needs of where a tensor goes; a tensor is one."""

    @property
    def shape(self) -> torch.Size:
        """The shape that the checkpoint's tensor must have."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that random weights are drawn in."""
        ...

    @property
    def device(self) -> torch.device: ...

    def copy_(self, source: Tensor, /) -> object:
        """Take the tensor, from whatever device and in whatever floating dtype it comes."""
        ...


class Converted:
    """Stores `convert(source)` in `target`, of the same shape."""

    def __init__(self, target: Destination, convert: Callable[[Tensor], Tensor]) -> None:
        self.target = target
        self.convert = convert

    @property
    def shape(self) -> torch.Size:
        return self.target.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.target.dtype

    @property
    def device(self) -> torch.device:
        return self.target.device

    def copy_(self, source: Tensor, /) -> None:
        self.target.copy_(self.convert(source))
