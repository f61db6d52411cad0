"""Ops on matrices in the groups of their file: products with them, packed when first used, and rows of them."""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hotplug.platforms.cpu.native.dense import rows_of_table
from hotplug.platforms.cpu.native.library import refusal
from hotplug.platforms.cpu.native.linear import KINDS, TILE, Packed, linear, linear_silu_mul, pack
from hotplug.vendor import Impl, SiteSpec, Verdict

_BYTES = {18: "Q4_0", 20: "Q4_1", 34: "Q8_0"}
"""The format by the bytes of a group of 32."""
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Of each weight, for as long as it lives. Weights do not change once they are used."""


def linear_stored(x: Tensor, data: Tensor, bias: Tensor | None) -> Tensor:
    """`x` float32 [n, in], rounded to eight bits by groups, times `data` uint8 [out, bytes of a row] transposed."""
    return linear(x if x.stride(-1) == 1 else x.contiguous(), _weight(data, x.shape[1]), bias)


def linear_stored_silu_mul(x: Tensor, data: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_stored` to 2n outputs, then silu of the first n times the others: float32 [num_tokens, n]."""
    return linear_silu_mul(x if x.stride(-1) == 1 else x.contiguous(), _weight(data, x.shape[1]), bias)


def embed_stored(token_ids: Tensor, data: Tensor, hidden: int) -> Tensor:
    """The op, from the groups as they are. Raises PlatformError for a token that there is none of."""
    return rows_of_table(token_ids, data, hidden, KINDS[_kind(data, hidden)])


def _weight(data: Tensor, columns: int) -> Packed:
    weight = _packed.get(data)
    if weight is None:
        raw = data.detach().contiguous().numpy()
        weight = _packed[data] = pack(_kind(data, columns), raw, data.shape[0], columns)
    return weight


def _kind(data: Tensor, columns: int) -> str:
    return _BYTES[data.shape[1] * 32 // columns]


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


KERNELS = (
    Impl("embed_stored", "cpu.native", embed_stored, check=_check, rank=10),
    Impl("linear_stored", "cpu.native", linear_stored, check=_check, rank=10),
    Impl("linear_stored_silu_mul", "cpu.native", linear_stored_silu_mul, check=_check_gated, rank=10),
    Impl("logits_stored", "cpu.native", linear_stored, check=_check, rank=10),
)
