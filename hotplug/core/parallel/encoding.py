"""A step plan as bytes, for ranks in other processes: msgspec, with arrays as their raw little-endian values.

Only what a rank cannot know is sent. Host tensors of a KV connector (`StepPlan.loads`) are not: each rank would need
a part of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from hotplug.core.errors import ConfigError
from hotplug.core.request import SamplingParams
from hotplug.core.scheduler.plan import Admission, BoolArray, IntArray, StepPlan

_INT, _BOOL = np.dtype("<i4"), np.dtype("?")


class _Admission(msgspec.Struct, array_like=True):
    """`Admission`, its tokens as bytes."""

    row: int
    token_ids: bytes
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...]


class _Plan(msgspec.Struct, array_like=True):
    """`StepPlan`, its arrays as bytes: those of length R in one, and the changes of the block tables in another."""

    entries: bytes
    """[3, R] int32: rows, start, num_tokens."""
    samples: bytes
    num_decodes: int
    num_verifies: int
    released: bytes
    admitted: list[_Admission]
    changes: bytes
    """[4, B] int32: block_tables, block_rows, block_cols, block_ids."""
    drafts: bytes
    saves: list[tuple[int, bytes]]
    swap_out: bytes
    """[n, 2] int32, as is `swap_in`."""
    swap_in: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Plan)


def encode_plan(plan: StepPlan) -> bytes:
    """The bytes of a plan. Raises ConfigError for one with `loads`."""
    if plan.loads:
        raise ConfigError("blocks of a KV connector cannot be sent to other ranks", hint="Leave out --kv-connector.")
    admitted = [
        _Admission(a.row, _bytes(a.token_ids), a.num_prompt_tokens, a.sampling, a.seed, a.eos_token_ids)
        for a in plan.admitted
    ]
    return _encoder.encode(
        _Plan(
            b"".join((_bytes(plan.rows), _bytes(plan.start), _bytes(plan.num_tokens))),
            np.ascontiguousarray(plan.samples, _BOOL).tobytes(),
            plan.num_decodes,
            plan.num_verifies,
            _bytes(plan.released),
            admitted,
            b"".join(map(_bytes, (plan.block_tables, plan.block_rows, plan.block_cols, plan.block_ids))),
            _bytes(plan.drafts),
            plan.saves,
            _pair_bytes(plan.swap_out),
            _pair_bytes(plan.swap_in),
        )
    )


def decode_plan(data: bytes | bytearray | memoryview) -> StepPlan:
    """The plan of `encode_plan`'s bytes; its arrays are read-only. Raises msgspec.DecodeError for other bytes."""
    sent = _decoder.decode(data)
    rows, start, num_tokens = _ints(sent.entries).reshape(3, -1)
    block_tables, block_rows, block_cols, block_ids = _ints(sent.changes).reshape(4, -1)
    samples: BoolArray = np.frombuffer(sent.samples, _BOOL)
    return StepPlan(
        rows=rows,
        start=start,
        num_tokens=num_tokens,
        samples=samples,
        num_decodes=sent.num_decodes,
        num_verifies=sent.num_verifies,
        released=_ints(sent.released),
        admitted=[
            Admission(a.row, _ints(a.token_ids), a.num_prompt_tokens, a.sampling, a.seed, a.eos_token_ids)
            for a in sent.admitted
        ],
        block_tables=block_tables,
        block_rows=block_rows,
        block_cols=block_cols,
        block_ids=block_ids,
        drafts=_ints(sent.drafts),
        saves=sent.saves,
        swap_out=_pairs(sent.swap_out),
        swap_in=_pairs(sent.swap_in),
    )


def _bytes(array: npt.NDArray[np.integer]) -> bytes:
    return np.ascontiguousarray(array, _INT).tobytes()


def _ints(data: bytes) -> IntArray:
    return np.frombuffer(data, _INT)


def _pair_bytes(pairs: Sequence[tuple[int, int]]) -> bytes:
    return np.array(pairs, _INT).tobytes()


def _pairs(data: bytes) -> list[tuple[int, int]]:
    return [(first, second) for first, second in _ints(data).reshape(-1, 2).tolist()]
