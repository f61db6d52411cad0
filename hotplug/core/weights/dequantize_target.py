"""Where a checkpoint's reader may write what it dequantizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

DequantizeTarget: TypeAlias = "Callable[[str, tuple[int, ...]], torch.Tensor | None]"
"""Where a weight of this name and shape may be written, float32 and contiguous on the host; None: nowhere yet."""


def no_target(name: str, shape: tuple[int, ...]) -> None:
    """Weights come in memory of their own."""
