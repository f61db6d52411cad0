"""One planted fault a class."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hotplug.vendor import DeviceInfo, ExecMode, Impl, Limits, NotHandled, OpRegistry, SiteSpec, Verdict, gather_kv
from wrong_platforms.right import Right


class SeesTheNextToken(Right):
    ahead = 1


class IgnoresWindow(Right):
    def window_of(self, window: int | None) -> int | None:
        return None


class ReadsPastTheEnd(Right):
    ahead = 1 << 30

    def kv_of(self, k_cache: Any, v_cache: Any, table: Any, seq_len: int, layout: str) -> Any:
        size = k_cache.shape[1] if layout == "NHD" else k_cache.shape[2]
        return gather_kv(k_cache, v_cache, table, -(-seq_len // size) * size, layout)


class MultipliesByZero(Right):
    """Right as long as cells past a sequence's end hold numbers."""

    def kv_of(self, k_cache: Any, v_cache: Any, table: Any, seq_len: int, layout: str) -> Any:
        size = k_cache.shape[1] if layout == "NHD" else k_cache.shape[2]
        return gather_kv(k_cache, v_cache, table, -(-seq_len // size) * size, layout)


class StoresWhatItIsGiven(Right):
    """NaN among the values too."""

    def storable(self, k: Any, v: Any) -> Any:
        return k, v


class TakesNoNumberForAToken(Right):
    """The best of scores of which some are NaN."""

    def register(self, ops: OpRegistry) -> None:
        super().register(ops)
        ops.add(Impl("argmax", self.name, make=lambda _: lambda logits: logits.argmax(-1)))


class LiesInCheck(Right):
    def check_attention(self, spec: SiteSpec) -> Verdict:
        honest = super().check_attention(spec)
        return Verdict(True) if "head_dim" in honest.reason else honest

    def attention(self, q: Any, *args: Any) -> Any:
        if q.shape[-1] > 128:
            raise RuntimeError("no tile for this head size")
        return super().attention(q, *args)


class LeaksMemory(Right):
    def __init__(self) -> None:
        self.kept: list[Any] = []

    def rope(self, q: Any, k: Any, positions: Any, cos_sin: Any) -> Any:
        rotated = super().rope(q, k, positions, cos_sin)
        self.kept.append(rotated[0])
        return rotated


class ScalesByGroup(Right):
    def scale_of(self, scale: float, group: int) -> float:
        return scale / group


class InterleavesHeads(Right):
    def owners(self, heads: int, kv_heads: int) -> Any:
        import torch

        return torch.arange(heads) % kv_heads


class DropsPartialBlock(Right):
    def kv_of(self, k_cache: Any, v_cache: Any, table: Any, seq_len: int, layout: str) -> Any:
        size = k_cache.shape[1] if layout == "NHD" else k_cache.shape[2]
        return gather_kv(k_cache, v_cache, table, seq_len // size * size, layout)


class WritesOneSlotLate(Right):
    def slot_of(self, slots: Any) -> Any:
        return slots + 1


class SeesItsOwnWritesOnly(Right):
    """A request reads what others write in the same step as it was before: its step writes and reads in turn."""

    def __init__(self) -> None:
        self.before: dict[int, tuple[Any, Any]] = {}
        self.written: Sequence[int] = ()

    def kv_write(self, k: Any, v: Any, k_cache: Any, v_cache: Any, slots: Any, layout: str) -> Any:
        self.before[k_cache.data_ptr()] = k_cache.clone(), v_cache.clone()
        self.num_written = len(slots)
        return super().kv_write(k, v, k_cache, v_cache, slots, layout)

    def attention(self, q: Any, k_cache: Any, v_cache: Any, step: Any, *args: Any) -> Any:
        if len(q) == self.num_written:  # the last layer may have fewer queries than tokens
            self.written = step.query_lens_host
        self.own = iter(self.written)
        return super().attention(q, k_cache, v_cache, step, *args)

    def kv_of(self, k_cache: Any, v_cache: Any, table: Any, seq_len: int, layout: str) -> Any:
        import torch

        old = gather_kv(*self.before[k_cache.data_ptr()], table, seq_len, layout)
        new = gather_kv(k_cache, v_cache, table, seq_len, layout)
        start = seq_len - next(self.own)
        return tuple(torch.cat((a[:start], b[start:])) for a, b in zip(old, new, strict=True))


class PairsNeighbours(Right):
    def rope(self, q: Any, k: Any, positions: Any, cos_sin: Any) -> Any:
        import torch

        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

        def rotate(x: Any) -> Any:
            wide = x[..., : 2 * cos.shape[-1]]
            first, second = wide[..., 0::2], wide[..., 1::2]
            pair = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
            return torch.cat((pair, x[..., 2 * cos.shape[-1] :]), dim=-1)

        return rotate(q), rotate(k)


class BakesInTheFirstStep(Right):
    """Its replay leaves everything as it was recorded."""

    def capture(self, step: Callable[[], Any], device: DeviceInfo) -> Callable[[], Any]:
        step()
        return lambda: None


class ReducesNothing(Right):
    def all_reduce(self, tensor: Any, group: Sequence[int]) -> Any:
        return tensor

    def all_gather(self, tensor: Any, group: Sequence[int]) -> Any:
        return NotHandled


class DeclaresTooMuch(Right):
    def limits(self, device: DeviceInfo) -> Limits:
        return replace(super().limits(device), exec_modes=(ExecMode.EAGER, ExecMode.COMPILE))


class ForgetsToZero(Right):
    def allocate(self, shape: Sequence[int], dtype: Any, device: DeviceInfo) -> Any:
        import torch

        return torch.full(tuple(shape), 3.0).to(dtype)

    def copy(self, source: Any, target: Any) -> None:
        target.copy_(source)


class CopiesKeysOnly(ForgetsToZero):
    """Zeroes, but its copy to the host does nothing."""

    def allocate(self, shape: Sequence[int], dtype: Any, device: DeviceInfo) -> Any:
        import torch

        return torch.zeros(tuple(shape), dtype=dtype)

    def copy(self, source: Any, target: Any) -> None:
        if source.untyped_storage().nbytes() > target.untyped_storage().nbytes():
            return
        target.copy_(source)


class RefusesWithoutReason(Right):
    def check_attention(self, spec: SiteSpec) -> Verdict:
        return Verdict(super().check_attention(spec).ok)


class FindsOthersWhenSpawned(Right):
    def probe(self) -> Sequence[DeviceInfo]:
        return [replace(super().probe()[0], name=f"process {os.getpid()}")]
