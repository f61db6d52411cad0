"""Copying KV blocks between tensors of one device: into one place before they leave it, and back to their layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hotplug.core.ops.registry import Bucket, Op


def block_copy(sources: list[Tensor], targets: list[Tensor], pairs: Tensor) -> None:
    """Copy block `pairs[i, 0]` of each source, bit by bit, to block `pairs[i, 1]` of the target at its place.

    `sources` and `targets` are as many tensors [num_blocks, ...] of one dtype, with blocks of one shape; the tensors of
    a list have one shape and the same strides. Blocks are dense and may lie apart, as in slices of a larger tensor.
    They come as lists because a block's keys and values are scattered over the caches of all layers: so a kernel can
    copy all of them in one launch, each byte once. `pairs` is [n, 2] in the index dtype. The caller sees to it that
    ids are in range, that no block is written twice, and that none is both read and written; one may be read twice.
    """
    read, written = pairs.unbind(1)
    for source, target in zip(sources, targets, strict=True):
        # index_select copies whole blocks; advanced indexing would go element by element
        _indexable(target)[written] = _indexable(source).index_select(0, read)


def _indexable(x: Tensor) -> Tensor:
    """`x`, as bytes where it is one byte wide: PyTorch does not index FP8 on every device."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def _bucket(sources: list[Tensor], targets: list[Tensor], pairs: Tensor, *_: Any) -> Bucket:
    return Bucket(len(pairs), len(pairs))


OPS = (
    Op(
        "block_copy",
        block_copy,
        facts=("page_bytes",),
        bucket=_bucket,
    ),
)
