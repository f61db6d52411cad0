"""Products with matrices in groups, which the kernels read in a layout of their own, and rows of them.

A matrix is packed at load (`repack`); one that comes in the groups of its file, since others read them too, when it is
first used, and is then there both ways.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hotplug.platforms.cpu.native.dense import rows_of_table
from hotplug.platforms.cpu.native.library import refusal
from hotplug.platforms.cpu.native.linear import GROUP, KINDS, SOURCE_BYTES, TILE, Packed, linear, linear_silu_mul, pack
from hotplug.vendor import Impl, SiteSpec, Verdict

PROVIDER = "cpu.native"

_KINDS = {size: kind for kind, size in SOURCE_BYTES.items()}
"""The format by the bytes of a group."""
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Of each matrix in groups, for as long as it lives. Weights do not change once they are used."""


def linear_packed(x: Tensor, data: Tensor, bias: Tensor | None) -> Tensor:
    """`x` float32 [n, in], rounded to eight bits by groups, times a matrix in groups, transposed.

    `data` is uint8: groups [out, bytes of a row], or what `repack` made of them.
    """
    return linear(x if x.stride(-1) == 1 else x.contiguous(), weight_of(data, x.shape[1]), bias)


def linear_packed_silu_mul(x: Tensor, data: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_packed` to 2n outputs, then silu of the first n times the others: float32 [num_tokens, n]."""
    return linear_silu_mul(x if x.stride(-1) == 1 else x.contiguous(), weight_of(data, x.shape[1]), bias)


def embed_packed(spec: SiteSpec) -> Callable[[Tensor, Tensor], Tensor]:
    """The op, from the groups as they are. Raises PlatformError for a token that there is none of."""
    hidden, kind = spec["hidden"], KINDS[str(spec["scheme"]).upper()]
    return lambda token_ids, data: rows_of_table(token_ids, data, hidden, kind)


def repack(data: Tensor, scheme: str) -> Tensor:
    """Groups [out, bytes of a row] of the format `scheme` in the kernels' layout: [out / 16, 1, bytes of 16 rows].

    `data` itself where the outputs do not fill tiles of 16, since their number would be lost.
    """
    if data.shape[0] % TILE:
        return data
    return _pack(data, scheme.upper()).tiles.unsqueeze(1)


def weight_of(data: Tensor, columns: int) -> Packed:
    """The matrix [out, columns] that an op is given as `data`, packed."""
    if data.ndim == 3:
        tiles, _, size = data.shape
        return Packed(_KINDS[size // TILE * GROUP // columns], tiles * TILE, columns, data)
    weight = _packed.get(data)
    if weight is None:
        weight = _packed[data] = _pack(data, _KINDS[data.shape[1] * GROUP // columns])
    return weight


def _pack(data: Tensor, kind: str) -> Packed:
    rows, size = data.shape
    columns = size // SOURCE_BYTES[kind] * GROUP
    return pack(kind, data.detach().contiguous().numpy(), rows, columns)


def _check(spec: SiteSpec) -> Verdict:
    if spec.dtype != "float32":
        return Verdict(False, f"takes activations in float32, not {spec.dtype}")
    if str(spec["scheme"]).upper() not in KINDS:
        return Verdict(False, f"has no kernel for {spec['scheme']}, only for {', '.join(KINDS)}")
    reason = refusal()
    return Verdict(reason is None, reason or "")


def _check_gated(spec: SiteSpec) -> Verdict:
    if spec["width"] % TILE:
        return Verdict(False, f"takes widths of multiples of {TILE}, not {spec['width']}")
    return _check(spec)


_PRODUCTS = (
    Impl("linear_packed", PROVIDER, make=lambda _: linear_packed, check=_check, rank=10),
    Impl("linear_packed_silu_mul", PROVIDER, make=lambda _: linear_packed_silu_mul, check=_check_gated, rank=10),
    Impl("logits_packed", PROVIDER, make=lambda _: linear_packed, check=_check, rank=10),
)
PACKED_OPS = frozenset(kernel.op for kernel in _PRODUCTS)
"""Ops whose kernels read what `repack` gives."""
KERNELS = (Impl("embed_packed", PROVIDER, make=embed_packed, check=_check, rank=10), *_PRODUCTS)
