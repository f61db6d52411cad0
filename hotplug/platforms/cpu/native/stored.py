"""Products with matrices in the groups of their file (`linear_stored`, `logits_stored`), packed when first used."""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hotplug.platforms.cpu.native.library import refusal
from hotplug.platforms.cpu.native.linear import KINDS, Packed, linear, pack
from hotplug.vendor import Impl, SiteSpec, Verdict

_BYTES = {18: "Q4_0", 20: "Q4_1", 34: "Q8_0"}
"""The format by the bytes of a group of 32."""
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Of each weight, for as long as it lives. Weights do not change once they are used."""


def linear_stored(x: Tensor, data: Tensor, bias: Tensor | None) -> Tensor:
    """`x` float32 [n, in], rounded to eight bits by groups, times `data` uint8 [out, bytes of a row] transposed."""
    weight = _packed.get(data)
    if weight is None:
        weight = _packed[data] = _pack(data, x.shape[1])
    return linear(x if x.stride(-1) == 1 else x.contiguous(), weight, bias)


def _pack(data: Tensor, columns: int) -> Packed:
    rows, size = data.shape
    return pack(_BYTES[size * 32 // columns], data.detach().contiguous().numpy(), rows, columns)


def _check(spec: SiteSpec) -> Verdict:
    if spec.dtype != "float32":
        return Verdict(False, f"takes activations in float32, not {spec.dtype}")
    if str(spec["scheme"]).upper() not in KINDS:
        return Verdict(False, f"has no kernel for {spec['scheme']}, only for {', '.join(KINDS)}")
    reason = refusal()
    return Verdict(reason is None, reason or "")


KERNELS = (
    Impl("linear_stored", "cpu.native", linear_stored, check=_check, rank=10),
    Impl("logits_stored", "cpu.native", linear_stored, check=_check, rank=10),
)
