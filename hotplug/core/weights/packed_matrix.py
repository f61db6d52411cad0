"""A matrix as its file stores it, in groups of weights that share a scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedMatrix:
    """What a checkpoint gives of a matrix that the model keeps as it is (`hotplug.core.quant.packed_scheme`)."""

    scheme: str
    """The format, as `Checkpoint.formats` names it."""
    data: Tensor
    """uint8 [rows, bytes of a row], maybe a read-only view of the file."""
    shape: torch.Size
    """That of the weights."""
