"""The GPU that a launch is for: that of its tensors, or the one that tensors without memory stand for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Standing(threading.local):
    gpu: torch.device | None = None


_standing = _Standing()


def target(device: torch.device) -> torch.device:
    """`device`, or what this thread's meta tensors stand for. What a launcher asks of a GPU it asks of this one."""
    if device.type == "meta" and _standing.gpu is not None:
        return _standing.gpu
    return device


@contextmanager
def stands_for(gpu: torch.device) -> Iterator[None]:
    """Within, this thread's meta tensors stand for tensors on `gpu`."""
    before, _standing.gpu = _standing.gpu, gpu
    try:
        yield
    finally:
        _standing.gpu = before
