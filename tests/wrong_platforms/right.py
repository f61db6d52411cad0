"""A small platform with kernels of its own, every one right. The wrong ones derive from it and spoil one thing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hotplug.vendor import DeviceInfo, ExecMode, KVLayout, Limits, MemoryInfo

if TYPE_CHECKING:
    from hotplug.vendor import AttentionInputs, OpRegistry, SiteSpec, Verdict


class Right:
    name = "right"
    torch_device = "cpu"
    api_version = "2.0"

    def probe(self) -> Sequence[DeviceInfo]:
        return [DeviceInfo(index=0, name="Right 1", arch="r1")]

    def limits(self, device: DeviceInfo) -> Limits:
        return Limits(
            dtypes=("float32",),
            block_sizes=(16, 32),
            kv_layouts=(KVLayout.NHD, KVLayout.HND),
            exec_modes=(ExecMode.CAPTURE, ExecMode.EAGER),
            max_graph_shapes=2,
            shared_host_memory=True,
        )

    def memory(self, device: DeviceInfo) -> MemoryInfo:
        page = os.sysconf("SC_PAGE_SIZE")
        return MemoryInfo(free=page * os.sysconf("SC_AVPHYS_PAGES"), total=page * os.sysconf("SC_PHYS_PAGES"))

    def register(self, ops: OpRegistry) -> None:
        from hotplug.vendor import Impl

        ops.add(Impl("attention", self.name, make=self.make_attention, check=self.check_attention))
        ops.add(Impl("kv_write", self.name, make=self.make_kv_write))
        ops.add(Impl("rope", self.name, make=lambda _: self.rope))

    def capture(self, step: Callable[[], Any], device: DeviceInfo) -> Callable[[], Any]:
        step()
        return step

    # --- kernels ---------------------------------------------------------------------------------

    ahead = 0
    """Tokens after its own that a query sees."""

    def check_attention(self, spec: SiteSpec) -> Verdict:
        from hotplug.vendor import Verdict

        if spec["static"]:
            return Verdict(False, "reads lengths on the host")
        if spec["sinks"] or spec["soft_cap"] is not None:
            return Verdict(False, "has no sinks and no soft cap")
        return Verdict(spec["head_dim"] <= 128, "" if spec["head_dim"] <= 128 else "head_dim above 128")

    def make_attention(self, spec: SiteSpec) -> Callable[..., Any]:
        constants = (spec["scale"], spec["window"], spec["layout"])

        def attend(q: Any, k_cache: Any, v_cache: Any, step: AttentionInputs, sinks: None) -> Any:
            return self.attention(q, k_cache, v_cache, step, *constants)

        return attend

    def make_kv_write(self, spec: SiteSpec) -> Callable[..., Any]:
        return partial(self.kv_write, layout=spec["layout"])

    def kv_of(self, k_cache: Any, v_cache: Any, table: Any, seq_len: int, layout: str) -> Any:
        from hotplug.vendor import gather_kv

        return gather_kv(k_cache, v_cache, table, seq_len, layout)

    def window_of(self, window: int | None) -> int | None:
        return window

    def scale_of(self, scale: float, group: int) -> float:
        return scale

    def owners(self, heads: int, kv_heads: int) -> Any:
        import torch

        return torch.arange(heads) // (heads // kv_heads)

    def attention(
        self, q: Any, k_cache: Any, v_cache: Any, step: AttentionInputs, scale: float, window: int | None, layout: str
    ) -> Any:
        import torch

        out, begin, window = torch.zeros_like(q), 0, self.window_of(window)
        for i, (queries, seq) in enumerate(zip(step.query_lens_host or (), step.seq_lens_host or (), strict=True)):
            k, v = self.kv_of(k_cache, v_cache, step.block_table[i], seq, layout)
            if len(k):
                owners = self.owners(q.shape[1], k.shape[1])
                key, query = torch.arange(len(k)), torch.arange(seq - queries, seq).unsqueeze(1)
                visible = key <= query + self.ahead
                if window is not None:
                    visible &= key > query - window
                if window is not None:
                    v = v.masked_fill(~visible.any(0)[:, None, None], 0.0)  # null entries
                own = q[begin : begin + queries].transpose(0, 1)
                factor = self.scale_of(scale, q.shape[1] // k.shape[1])
                scores = own @ k[:, owners].permute(1, 2, 0) * factor
                weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
                weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)  # of queries that see nothing
                out[begin : begin + queries] = (weights @ v[:, owners].transpose(0, 1)).transpose(0, 1)
            begin += queries
        return out

    def slot_of(self, slots: Any) -> Any:
        return slots

    def storable(self, k: Any, v: Any) -> Any:
        from hotplug.vendor import finite_values

        return finite_values(k, v)

    def kv_write(self, k: Any, v: Any, k_cache: Any, v_cache: Any, slots: Any, layout: str) -> Any:
        slots = self.slot_of(slots)
        k, v = self.storable(k, v)
        size = k_cache.shape[1] if layout == "NHD" else k_cache.shape[2]
        for values, cache in ((k, k_cache), (v, v_cache)):
            rows = cache if layout == "NHD" else cache.transpose(1, 2)
            rows[slots // size, slots % size] = values
        return k_cache, v_cache

    def rope(self, q: Any, k: Any, positions: Any, cos_sin: Any) -> Any:
        import torch

        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

        def rotate(x: Any) -> Any:
            half = cos.shape[-1]
            first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
            return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

        return rotate(q), rotate(k)
