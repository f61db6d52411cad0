"""Random paged-attention steps: caches with shuffled blocks, and what each request may see, densely."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hotplug.core.ops.attention import AttentionInputs, kv_write


@dataclass
class Case:
    """A step and the dense keys and values it stands for."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    step: AttentionInputs
    keys: list[Tensor]
    values: list[Tensor]
    layout: str


def make_case(
    lens: list[tuple[int, int]], *, heads: int = 4, kv_heads: int = 2, dim: int = 8, block: int = 4,
    layout: str = "NHD", dtype: torch.dtype = torch.float32, cache_dtype: torch.dtype | None = None, seed: int = 0,
    index_dtype: torch.dtype = torch.int64, unused: float = 7.0,
) -> Case:  # fmt: skip
    """`lens` holds (query tokens, sequence tokens) of each request, decodes first. Unused cells hold `unused`."""
    rng = torch.Generator().manual_seed(seed)
    widths = [-(-seq // block) for _, seq in lens]
    total, widest = sum(widths) + 3, max(widths, default=1)
    shape = (total, block, kv_heads, dim) if layout == "NHD" else (total, kv_heads, block, dim)
    k_cache, v_cache = (torch.full(shape, unused, dtype=cache_dtype or dtype) for _ in range(2))
    ids = torch.randperm(total - 1, generator=rng)[: sum(widths)] + 1
    table = torch.zeros((len(lens), widest), dtype=index_dtype)
    keys, values, used = [], [], 0
    for i, (width, (_, seq)) in enumerate(zip(widths, lens, strict=True)):
        blocks = ids[used : used + width]
        table[i, :width] = blocks
        used += width
        k, v = (torch.randn((seq, kv_heads, dim), generator=rng).to(dtype) for _ in range(2))
        position = torch.arange(seq)
        kv_write(k, v, k_cache, v_cache, blocks[position // block] * block + position % block, layout)
        keys.append(k.to(k_cache.dtype).to(dtype))
        values.append(v.to(v_cache.dtype).to(dtype))
    queries, seqs = [n for n, _ in lens], [n for _, n in lens]
    step = AttentionInputs(
        block_table=table,
        query_start=torch.tensor([0, *queries]).cumsum(0).to(index_dtype),
        seq_lens=torch.tensor(seqs, dtype=index_dtype),
        query_lens_host=queries,
        seq_lens_host=seqs,
        num_decodes=next((i for i, n in enumerate(queries) if n > 1), len(lens)),
        max_query_len=max(queries, default=0),
        max_seq_len=max(seqs, default=0),
    )
    q = torch.randn((sum(queries), heads, dim), generator=rng).to(dtype)
    return Case(q, k_cache, v_cache, step, keys, values, layout)


def dense_attention(
    case: Case, scale: float, window: int | None, sinks: Tensor | None = None, soft_cap: float | None = None
) -> Tensor:
    """Every query and head by itself, in float64."""
    out = torch.empty(case.q.shape, dtype=torch.float64)
    group = case.q.shape[1] // case.keys[0].shape[1] if case.keys else 1
    at = 0
    for i, (queries, seq) in enumerate(zip(case.step.query_lens_host, case.step.seq_lens_host, strict=True)):
        for n in range(queries):
            position = seq - queries + n
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(case.q.shape[1]):
                k = case.keys[i][first : position + 1, head // group].double()
                v = case.values[i][first : position + 1, head // group].double()
                scores = k @ case.q[at, head].double() * scale
                if soft_cap is not None:
                    scores = (scores / soft_cap).tanh() * soft_cap
                weights = scores.exp()
                total = weights.sum() + (0 if sinks is None else sinks[head].double().exp())
                out[at, head] = weights @ v / total
            at += 1
    return out
