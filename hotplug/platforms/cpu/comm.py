"""Collectives on the host: torch.distributed's, as calls that a recorded step makes again as a whole.

Recording goes by operator, and what waits for a collective is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hotplug.platforms.cpu.capture import opaque


@opaque
def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over the ranks of the default group, in place."""
    torch.distributed.all_reduce(tensor)
    return tensor


@opaque
def all_gather(tensor: Tensor) -> Tensor:
    """The tensors [rows, n] of all ranks beside each other: [rows, ranks * n]."""
    parts = tensor.new_empty((torch.distributed.get_world_size(), *tensor.shape))
    torch.distributed.all_gather(list(parts.unbind()), tensor.contiguous())
    return parts.transpose(0, 1).flatten(1)
