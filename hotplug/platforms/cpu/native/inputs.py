"""A step's inputs by the native library (`src/step.h`): tokens, positions, slots, lengths and block tables, int64."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hotplug.platforms.cpu.native.library import call, refusal
from hotplug.vendor import Impl, SiteSpec, Verdict

_call = struct.Struct("@11P7q").pack
"""`hp_prepare_step_call`."""


def prepare_inputs(spec: SiteSpec) -> Callable[..., tuple[Tensor, ...]]:
    """The op. Raises as `prepare_step` does."""
    block_size = spec["block_size"]
    return lambda *inputs: _prepared(*inputs, 0, block_size)[:4]


def prepare_step(spec: SiteSpec) -> Callable[..., tuple[Tensor, ...]]:
    """The op. Raises PlatformError for a row or a block that there is none of, ValueError for int32 tensors."""
    return partial(_prepared, block_size=spec["block_size"])


def _prepared(
    token_ids: Tensor, rows: Tensor, query_start: Tensor, start: Tensor, last_tokens: Tensor, block_tables: Tensor,
    num_blocks: int, block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = (token_ids, rows, query_start, start, last_tokens)
    if any(x.dtype is not torch.int64 for x in (*given, block_tables)):
        raise ValueError("inputs must be int64, the CPU platform's index dtype")
    given = tuple(x if x.is_contiguous() else x.contiguous() for x in given)
    block_tables = block_tables if block_tables.stride(1) == 1 else block_tables.contiguous()
    tokens, requests = len(token_ids), len(rows)
    batch, max_blocks = block_tables.shape
    num_blocks = min(num_blocks, max_blocks)
    out = torch.empty((3, tokens), dtype=torch.int64)
    lens = torch.empty(requests, dtype=torch.int64)
    table = torch.empty((requests, num_blocks), dtype=torch.int64)
    out_tokens, positions, slots = out.unbind()
    call("hp_prepare_step", _call(
        *(x.data_ptr() for x in (*given, block_tables, out_tokens, positions, slots, lens, table)),
        tokens, requests, min(batch, len(last_tokens)), max_blocks, block_tables.stride(0), block_size, num_blocks,
    ))  # fmt: skip
    return out_tokens, positions, slots, lens, table


def _check(_: SiteSpec) -> Verdict:
    reason = refusal()
    return Verdict(reason is None, reason or "")


KERNELS = (
    Impl("prepare_inputs", "cpu.native", make=prepare_inputs, check=_check, rank=10),
    Impl("prepare_step", "cpu.native", make=prepare_step, check=_check, rank=10),
)
