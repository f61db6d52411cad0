"""Prompt chunks by FlashInfer (Ye et al., 2025), which reads the cache's blocks itself, decodes by the Triton kernel.

FlashInfer plans a step on the host (which tiles run where), once for all layers that differ in nothing but their
weights. Steps without lengths on the host go to the Triton kernel. It builds its kernels with nvcc when they are first
asked for, a minute or more each, and keeps them; the warm-up asks for those of a model while its weights load.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from shutil import which
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hotplug.platforms.cuda.kernels import gpu
from hotplug.platforms.cuda.kernels.attention import attention as paged_attention
from hotplug.platforms.cuda.kernels.decode_attention import decode
from hotplug.platforms.cuda.kernels.gathered_attention import STATIC, chunked, plain
from hotplug.platforms.cuda.kernels.made import made
from hotplug.platforms.cuda.target import target
from hotplug.vendor import AttentionInputs, Impl, SiteSpec, Verdict

HEAD_DIMS = (64, 128, 256)
WORKSPACE = {"fa2": 384 << 20, "fa3": 1 << 20}
"""Bytes for parts of contexts that are split over programs: two tiles a multiprocessor. "fa3" splits none."""
RANK = 4
"""Below the Triton kernel's, so that it has to be forced, until it is measured to be faster."""


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """The prompt chunks of a step, made once for all its layers. int32, pinned on the host but for the pages."""

    query_start: Tensor
    """[chunks + 1] first query of each chunk, from the first chunk's on."""
    page_start: Tensor
    """[chunks + 1] first of each chunk's blocks among `pages`."""
    pages: Tensor
    """[blocks], on the device, those that hold the chunks' keys, request after request."""
    last_page_len: Tensor
    """[chunks] keys in the last block of each."""


def pages_of(queries: list[int], seqs: list[int], table: Tensor, block_size: int, window: int | None = None) -> Pages:
    """Chunks of `queries` tokens that end sequences of `seqs` tokens, in the blocks of `table` [chunks, any].

    The first block that a query sees takes the place of those behind its window: these may be the null block, whose
    cells may hold anything, and the library multiplies values by weights of zero.
    """
    blocks = [-(-seq // block_size) for seq in seqs]
    lists = ([0, *accumulate(queries)], [0, *accumulate(blocks)], [(seq - 1) % block_size + 1 for seq in seqs])
    query_start, page_start, last = (torch.tensor(x, dtype=torch.int32, pin_memory=table.is_cuda) for x in lists)
    unseen = [0 if window is None else max(s - q + 1 - window, 0) // block_size
              for q, s in zip(queries, seqs, strict=True)]  # fmt: skip
    kept = [(row[n : n + 1].expand(n), row[n:count]) for row, n, count in zip(table, unseen, blocks, strict=True)]
    pages = torch.cat([part for parts in kept for part in parts]).to(torch.int32)
    return Pages(query_start, page_start, pages, last)


def _pages_of_chunks(step: AttentionInputs, block_size: int, window: int | None) -> Pages:
    """Of a step whose lengths are on the host."""
    begin, queries, seqs = step.num_decodes, step.query_lens_host, step.seq_lens_host
    assert queries is not None and seqs is not None
    return pages_of(queries[begin:], seqs[begin:], step.block_table[begin:], block_size, window)


class Kind(NamedTuple):
    """What layers that share a plan have in common."""

    heads: int
    kv_heads: int
    dim: int
    block_size: int
    dtype: torch.dtype
    scale: float
    window: int | None
    soft_cap: float | None
    backend: str


class Planner:
    """FlashInfer's wrapper for layers of a kind, with the step that it is planned for."""

    def __init__(self, kind: Kind, workspace: Tensor) -> None:
        self.wrapper: Any = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper(
            workspace, "NHD", backend=kind.backend
        )
        self._kind = kind
        self._planned: Pages | None = None
        self._read = torch.cuda.Event() if workspace.is_cuda else None

    def plan(self, pages: Pages) -> None:
        """Plan for `pages` unless that is what it is planned for."""
        if pages is self._planned:
            return
        if self._read is not None:
            self._read.synchronize()  # the last plan leaves the host from memory that this one overwrites
        self._planned, kind = None, self._kind
        self.wrapper.plan(
            pages.query_start, pages.page_start, pages.pages, pages.last_page_len, kind.heads, kind.kv_heads, kind.dim,
            kind.block_size, causal=True, sm_scale=kind.scale, q_data_type=kind.dtype, logits_soft_cap=kind.soft_cap,
            window_left=-1 if kind.window is None else kind.window - 1,
        )  # fmt: skip
        if self._read is not None:
            self._read.record()
        self._planned = pages


@cache
def _workspace(device: torch.device, backend: str) -> Tensor:
    """Written and read within a layer, so all planners of a device have one."""
    return torch.zeros(WORKSPACE[backend], dtype=torch.uint8, device=device)


@cache
def _planner(kind: Kind, device: torch.device) -> Planner:
    return Planner(kind, _workspace(device, kind.backend))


@cache
def build(kind: Kind, device: torch.device) -> None:
    """Build what layers of `kind` launch on `device`, or load it: planning one token does. Uses no shared planner."""
    workspace, table = (torch.zeros(size, dtype=torch.uint8, device=device) for size in ((1 << 20,), (1, 1)))
    Planner(kind, workspace).plan(pages_of([1], [1], table, kind.block_size))


_alone = threading.Lock()
"""Held from a plan to the launch that it is for: the next plan may be another thread's."""


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, sinks: Tensor | None, *, scale: float,
    window: int | None, soft_cap: float | None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Chunks by FlashInfer's kernels `backend`, "fa2" or "fa3"; by default those for the generation of the GPU."""
    decodes, queries, seqs = step.num_decodes, step.query_lens_host, step.seq_lens_host
    if queries is None or seqs is None or decodes == len(seqs):
        return paged_attention(q, k_cache, v_cache, step, sinks, scale=scale, window=window, soft_cap=soft_cap)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if decodes:
        decode(q[:decodes], k_cache, v_cache, step, out[:decodes], scale, window, sinks, soft_cap)
    backend = backend or ("fa3" if gpu.capability(q.device) == gpu.HOPPER else "fa2")
    block_size, kv_heads = k_cache.shape[1:3]
    kind = Kind(q.shape[1], kv_heads, q.shape[2], block_size, q.dtype, scale, window, soft_cap, backend)
    if q.is_meta:
        build(kind, target(q.device))
        return out
    pages = step.once(_pages_of_chunks, block_size, window)
    planner = _planner(kind, q.device)
    with _alone:
        planner.plan(pages)
        planner.wrapper.run(q[decodes:], (k_cache, v_cache), out=out[decodes:], enable_pdl=False)
    return out


@cache
def missing() -> str:
    """Why FlashInfer cannot run here; "" where it can."""
    try:
        import_module("flashinfer")
    except (ImportError, RuntimeError, OSError) as e:  # its other packages too, of other versions or unwritable caches
        return f"FlashInfer cannot be imported: {e}"
    if find_spec("flashinfer_jit_cache") is not None:
        return ""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else which("nvcc") or "/usr/local/cuda/bin/nvcc"  # where it looks too
    tools = {"nvcc": os.environ.get("FLASHINFER_NVCC", nvcc), "ninja": "ninja", "c++": os.environ.get("CXX", "c++")}
    lacking = [name for name, command in tools.items() if which(command) is None]
    return f"FlashInfer cannot build its kernels: no {', no '.join(lacking)}" if lacking else ""


def _check(spec: SiteSpec) -> Verdict:
    if not torch.cuda.is_available():
        return Verdict(False, "PyTorch sees no GPU")
    verdict = plain(spec, window=True, soft_cap=True, dtypes=("bfloat16", "float16"))
    if not verdict.ok:
        return verdict
    if spec["head_dim"] not in HEAD_DIMS:
        return Verdict(False, f"has heads of {', '.join(map(str, HEAD_DIMS))}, not {spec['head_dim']}")
    return Verdict(not missing(), missing())


KERNELS = (
    Impl("attention", "cuda.flashinfer", make=made(attention, *STATIC), check=_check, accepts=chunked, rank=RANK),
)
