"""Generated calls of ops: arguments of call sites on the host, from an op's facts and the lengths of a step.

KV cells beyond a sequence's end, and blocks of nobody, hold large values: what reads them is far off. In calls with
`lost` numbers they hold NaN and infinities, some keys of a sequence are NaN too, and table entries behind a window are
the null block: what multiplies these by zero, or adds them to minus infinity, gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hotplug.core.ops.attention import AttentionInputs, kv_write
from hotplug.core.ops.registry import Fact
from hotplug.core.quant.packed_scheme import PackedScheme
from hotplug.core.request import NO_TOKEN

TORCH_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "fp8_e4m3": torch.float8_e4m3fn,
    "int32": torch.int32, "int64": torch.int64,
}  # fmt: skip
POISON = 96.0
"""Within reach of every dtype, far from a standard normal value."""

Lens = Sequence[tuple[int, int]]
"""(query tokens, sequence tokens) of each request, decodes first."""


LOST_OPS = frozenset({
    "attention", "kv_write", "rope_kv_write", "qk_norm_rope_kv_write", "argmax", "sample", "sample_rows",
    "prepare_inputs", "prepare_step",
})  # fmt: skip
"""Ops that say what becomes of numbers that are not finite."""


@dataclass
class Call:
    """Arguments of one call of a site, and how much of its first result means something."""

    args: tuple[Any, ...]
    rows: int | None = None
    """Rows of the result that are not padding; None = all."""


class Builder:
    """Makes calls of one dtype from a seed."""

    def __init__(self, dtype: str, index_dtype: str, seed: int) -> None:
        self.dtype = TORCH_DTYPES[dtype]
        self.index = TORCH_DTYPES[index_dtype]
        self.random = torch.Generator().manual_seed(seed)

    def call(
        self, op: str, facts: Mapping[str, Fact], lens: Lens, *, view: bool = False, lost: bool = False
    ) -> Call | None:
        """A call of `op` for a step of `lens`; None for an op that this kit does not know.

        With `view`, tensors are slices of larger ones, as a model's fused projections make them. With `lost`, which
        `LOST_OPS` have, there are numbers among them that are not finite.
        """
        build = getattr(self, f"_{op}", None)
        if build is None:
            return None
        call: Call = build(facts, lens, view)
        if lost:
            getattr(self, f"_lose_{op}")(call, facts, lens)
        return call

    # --- dense -----------------------------------------------------------------------------------

    def _embed(self, facts: Any, lens: Lens, view: bool) -> Call:
        ids = self._ints(_tokens(lens), facts["vocab"])
        return Call((ids, self._normal(facts["vocab"], facts["hidden"])))

    def _linear(self, facts: Any, lens: Lens, view: bool) -> Call:
        wide, out = facts["in_features"], facts["out_features"]
        bias = self._normal(out) if facts["bias"] else None
        return Call((self._normal(_tokens(lens), wide, view=view), self._normal(out, wide) * wide**-0.5, bias))

    def _logits(self, facts: Any, lens: Lens, view: bool) -> Call:
        return self._linear({**facts, "in_features": facts["hidden"], "out_features": facts["vocab"]}, lens, view)

    def _embed_packed(self, facts: Any, lens: Lens, view: bool) -> Call:
        ids = self._ints(_tokens(lens), facts["vocab"])
        return Call((ids, self._groups(facts["vocab"], facts["hidden"], facts["scheme"])))

    def _linear_packed(self, facts: Any, lens: Lens, view: bool) -> Call:
        wide, out = facts["in_features"], facts["out_features"]
        bias = self._normal(out) if facts["bias"] else None
        return Call((self._normal(_tokens(lens), wide, view=view), self._groups(out, wide, facts["scheme"]), bias))

    def _linear_packed_silu_mul(self, facts: Any, lens: Lens, view: bool) -> Call:
        return self._linear_packed({**facts, "out_features": 2 * facts["width"]}, lens, view)

    def _logits_packed(self, facts: Any, lens: Lens, view: bool) -> Call:
        return self._linear_packed(
            {**facts, "in_features": facts["hidden"], "out_features": facts["vocab"]}, lens, view
        )

    def _groups(self, rows: int, columns: int, scheme: str) -> Tensor:
        weight = torch.randn((rows, columns), generator=self.random) * columns**-0.5
        (data,) = PackedScheme(scheme).quantize(weight)
        return data

    def _silu_mul(self, facts: Any, lens: Lens, view: bool) -> Call:
        return Call((self._normal(_tokens(lens), 2 * facts["width"], view=view),))

    def _gelu_tanh_mul(self, facts: Any, lens: Lens, view: bool) -> Call:
        return self._silu_mul(facts, lens, view)

    def _linear_silu_mul(self, facts: Any, lens: Lens, view: bool) -> Call:
        return self._linear({**facts, "out_features": 2 * facts["width"]}, lens, view)

    def _rms_norm(self, facts: Any, lens: Lens, view: bool) -> Call:
        return Call((self._normal(_tokens(lens), facts["width"], view=view), self._normal(facts["width"])))

    def _add_rms_norm(self, facts: Any, lens: Lens, view: bool) -> Call:
        x, residual = (self._normal(_tokens(lens), facts["width"], view=view) for _ in range(2))
        return Call((x, residual, self._normal(facts["width"])))

    def _moe_route(self, facts: Any, lens: Lens, view: bool) -> Call:
        """Scores that are exact in every dtype: which experts are best is then no matter of rounding."""
        hidden = facts["hidden"]
        x = torch.randint(-2, 3, (_tokens(lens), (2 if view else 1) * hidden), generator=self.random)
        weight = torch.randint(-2, 3, (facts["num_experts"], hidden), generator=self.random) / 8
        return Call((x.to(self.dtype)[:, :hidden], weight.to(self.dtype)))

    def _moe_experts(self, facts: Any, lens: Lens, view: bool) -> Call:
        hidden, width, count, top_k = (facts[name] for name in ("hidden", "width", "num_experts", "top_k"))
        scores = torch.randn((_tokens(lens), count), generator=self.random).softmax(-1)
        weights, experts = scores.topk(top_k)
        gate_up = self._normal(count, 2 * width, hidden) * hidden**-0.5
        down = self._normal(count, hidden, width) * width**-0.5
        return Call((self._normal(_tokens(lens), hidden, view=view), weights, experts.to(torch.int32), gate_up, down))

    # --- attention -------------------------------------------------------------------------------

    def _rope(self, facts: Any, lens: Lens, view: bool) -> Call:
        q, k = self._heads(facts, lens, view)
        return Call((q, k, self._positions(lens), self._cos_sin(facts, lens)))

    def _qk_norm_rope(self, facts: Any, lens: Lens, view: bool) -> Call:
        q, k = self._heads(facts, lens, view)
        q_weight, k_weight = self._normal(facts["head_dim"]), self._normal(facts["head_dim"])
        return Call((q, k, q_weight, k_weight, self._positions(lens), self._cos_sin(facts, lens)))

    def _kv_write(self, facts: Any, lens: Lens, view: bool) -> Call:
        tokens, block = _tokens(lens), facts["block_size"]
        caches = self._caches(facts, tokens // block + 3)
        slots = torch.randperm(caches[0].shape[0] * block - block, generator=self.random)[:tokens] + block
        width = (facts["num_kv_heads"], facts["head_dim"])
        k, v = (self._normal(tokens, *width, view=view) for _ in range(2))
        return Call((k, v, *caches, slots.to(self.index)))

    def _block_copy(self, facts: Any, lens: Lens, view: bool) -> Call:
        """The sequences' blocks, some of them read twice, of three caches; with `view` both lists are slices."""
        blocks = sum(-(-seq // 16) for _, seq in lens)
        read = torch.randint(1, blocks + 2, (blocks,), generator=self.random)
        written = torch.randperm(blocks + 2, generator=self.random)[:blocks] + 1
        shape, dtype = (facts["page_bytes"],), torch.uint8
        source = torch.randint(0, 256, (blocks + 2, 3, *shape), generator=self.random).to(dtype)
        sources, targets = (
            list(source.unbind(1)),
            list(torch.zeros((blocks + 3, 5, *shape), dtype=dtype).unbind(1)[1:4]),
        )
        if not view:
            sources, targets = [s.contiguous() for s in sources], [t.contiguous() for t in targets]
        return Call((sources, targets, torch.stack((read, written), 1).to(self.index)))

    def _rope_kv_write(self, facts: Any, lens: Lens, view: bool) -> Call:
        q, k = self._heads(facts, lens, view)
        _, v, *written = self._kv_write(facts, lens, view).args
        return Call((q, k, v, self._positions(lens), self._cos_sin(facts, lens), *written))

    def _qk_norm_rope_kv_write(self, facts: Any, lens: Lens, view: bool) -> Call:
        q, k, v, *rest = self._rope_kv_write(facts, lens, view).args
        q_weight, k_weight = self._normal(facts["head_dim"]), self._normal(facts["head_dim"])
        return Call((q, k, v, q_weight, k_weight, *rest))

    def _attention(self, facts: Any, lens: Lens, view: bool) -> Call:
        block, layout = facts["block_size"], facts["layout"]
        widths = [-(-seq // block) for _, seq in lens]
        k_cache, v_cache = self._caches(facts, sum(widths) + 3)
        ids = torch.randperm(len(k_cache) - 1, generator=self.random) + 1
        table = torch.zeros((len(lens), max(widths, default=1)), dtype=self.index)
        used = 0
        for i, (width, (_, seq)) in enumerate(zip(widths, lens, strict=True)):
            blocks = ids[used : used + width]
            table[i, :width], used = blocks, used + width
            k, v = (self._normal(seq, facts["num_kv_heads"], facts["head_dim"]) for _ in range(2))
            position = torch.arange(seq)
            kv_write(k, v, k_cache, v_cache, blocks[position // block] * block + position % block, layout)
        q = self._normal(_tokens(lens), facts["num_heads"], facts["head_dim"], view=view)
        step, rows = self._step(lens, table), None
        if facts["static"]:
            q, step, rows = self._padded(q, step)
        sinks = self._normal(facts["num_heads"]) if facts["sinks"] else None
        return Call((q, k_cache, v_cache, step, sinks), rows)

    def _step(self, lens: Lens, table: Tensor) -> AttentionInputs:
        queries, seqs = [q for q, _ in lens], [s for _, s in lens]
        return AttentionInputs(
            block_table=table,
            query_start=torch.tensor([0, *queries]).cumsum(0).to(self.index),
            seq_lens=torch.tensor(seqs, dtype=self.index),
            query_lens_host=queries,
            seq_lens_host=seqs,
            num_decodes=next((i for i, n in enumerate(queries) if n > 1), len(lens)),
            max_query_len=max(queries, default=0),
            max_seq_len=max(seqs, default=0),
        )

    def _padded(self, q: Tensor, step: AttentionInputs) -> tuple[Tensor, AttentionInputs, int]:
        """The same step in a static shape: two requests and, for prompt chunks, three tokens of padding."""
        rows, spare = len(q), 2
        decodes = step.max_query_len <= 1
        tokens = rows + spare if decodes else rows + spare + 3
        table = torch.cat((step.block_table, torch.zeros_like(step.block_table[:1]).expand(spare, -1)))
        starts = torch.arange(len(table) + 1) if decodes else torch.cat(
            (step.query_start, torch.full((spare,), rows, dtype=self.index)))  # fmt: skip
        seq_lens = torch.cat((step.seq_lens, torch.ones(spare, dtype=self.index)))
        padded = AttentionInputs.from_node(table, starts.to(self.index), seq_lens, 1 if decodes else tokens)
        return torch.cat((q, self._normal(tokens - rows, *q.shape[1:]))), padded, rows

    def _lose_attention(self, call: Call, facts: Any, lens: Lens) -> None:
        """Cells of nobody, null entries behind the window, and one key of a sequence, whose value is 0 as stored."""
        _, k_cache, v_cache, step, *_ = call.args
        block, window = facts["block_size"], facts["window"]
        k, v = (x.transpose(1, 2) if facts["layout"] == "HND" else x for x in (k_cache, v_cache))
        free = torch.ones(k.shape[:2], dtype=torch.bool)
        for i, (query, seq) in enumerate(lens):
            position = torch.arange(seq)
            cells = step.block_table[i].long()[position // block], position % block
            free[cells] = False
            if window is not None:
                behind = max(seq - query + 1 - window, 0) // block
                free[step.block_table[i, :behind].long()] = True
                step.block_table[i, :behind] = 0
        for x, shift in ((k, 0), (v, 1)):
            strange = torch.tensor([math.nan, POISON, math.inf, -math.inf]).roll(shift)
            where = free.nonzero()
            x[free] = strange[torch.arange(len(where)) % 4].to(x.dtype)[:, None, None].expand(-1, *x.shape[2:])
        marked = next((i for i, (query, _) in enumerate(lens) if query > 1), 0)
        if len(lens) > 1 and lens[marked][1] > 1:
            at = lens[marked][1] - max(lens[marked][0] // 2, 1)
            cell = int(step.block_table[marked, at // block]), at % block
            k[cell][..., 0] = math.nan
            v[cell][..., 0] = 0.0

    def _lose_kv_write(self, call: Call, facts: Any, lens: Lens) -> None:
        self._lose_values(call.args[1])

    def _lose_rope_kv_write(self, call: Call, facts: Any, lens: Lens) -> None:
        self._lose_values(call.args[2])

    def _lose_qk_norm_rope_kv_write(self, call: Call, facts: Any, lens: Lens) -> None:
        self._lose_values(call.args[2])

    def _lose_values(self, v: Tensor) -> None:
        """An element of the first token's values, all of another's."""
        if len(v):
            v[0, -1, 1] = math.nan
            v[len(v) // 2, 0] = math.inf
            v[len(v) // 2, 0, 0] = -math.inf

    # --- sampling --------------------------------------------------------------------------------

    def _argmax(self, facts: Any, lens: Lens, view: bool) -> Call:
        """Small whole numbers, so that the best score is often there twice."""
        return Call((torch.randn((max(len(lens), 1), facts["vocab"]), generator=self.random).round(),))

    def _sample(self, facts: Any, lens: Lens, view: bool) -> Call:
        rows, vocab = max(len(lens), 1), facts["vocab"]
        logits = torch.randn((rows, vocab), generator=self.random) * 3
        some = torch.rand((4, rows), generator=self.random)
        top_k = (some[0] * min(vocab, 40)).to(torch.int64)
        seeds = torch.randint(0, 2**40, (rows,), generator=self.random)
        counters = torch.arange(rows)
        return Call((logits, some[1] + 0.1, top_k, some[2].clamp(0.1), some[3] * 0.2, seeds, counters))

    def _sample_rows(self, facts: Any, lens: Lens, view: bool) -> Call:
        """Batch rows in any order, every third of them greedy, with neutral filters among the others."""
        logits, *_ = self._sample(facts, lens, view).args
        batch = len(logits) + 3
        rows = torch.randperm(batch, generator=self.random)[: len(logits)].to(self.index)
        some = torch.rand((4, batch), generator=self.random)
        temperature, top_p, min_p = some[0] + 0.1, some[1].clamp(0.1), some[2] * 0.2
        top_k = (some[3] * min(facts["vocab"], 40)).to(torch.int64)
        temperature[::3], top_k[1::5], top_p[2::5], min_p[::4] = 0.0, 0, 1.0, 0.0
        seeds = torch.randint(-(2**40), 2**40, (batch,), generator=self.random)
        counters = torch.randint(0, 1000, (len(logits),), generator=self.random)
        return Call((logits, rows, temperature, top_k, top_p, min_p, seeds, counters))

    def _lose_argmax(self, call: Call, facts: Any, lens: Lens) -> None:
        """Every second row, in turn: one score NaN, all minus infinity, one infinite, all NaN."""
        logits = call.args[0]
        for i in range(0, len(logits), 2):
            match i // 2 % 4:
                case 0:
                    logits[i, -1] = math.nan
                case 1:
                    logits[i] = -math.inf
                case 2:
                    logits[i, facts["vocab"] // 2] = math.inf
                case _:
                    logits[i] = math.nan

    def _lose_sample(self, call: Call, facts: Any, lens: Lens) -> None:
        self._lose_argmax(call, facts, lens)

    def _lose_sample_rows(self, call: Call, facts: Any, lens: Lens) -> None:
        self._lose_argmax(call, facts, lens)

    def _reject_sample(self, facts: Any, lens: Lens, view: bool) -> Call:
        """Proposals that hold for a part of each request, all of it in some."""
        first = torch.tensor([0, *(query for query, _ in lens)]).cumsum(0)
        tokens = torch.randint(0, 4, (_tokens(lens),), generator=self.random)
        proposed = torch.where(torch.rand(tokens.shape, generator=self.random) < 0.8, tokens, tokens + 1)
        proposed[first[1:] - 1] = -1
        return Call((tokens, proposed.to(self.index), first.to(self.index)))

    def _logprobs(self, facts: Any, lens: Lens, view: bool) -> Call:
        logits = torch.randn((max(len(lens), 1), facts["vocab"]), generator=self.random)
        return Call((logits, logits.argmax(-1), min(5, facts["vocab"])))

    def _penalties(self, facts: Any, lens: Lens, view: bool) -> Call:
        rows, vocab = max(len(lens), 1), facts["vocab"]
        logits = torch.randn((rows, vocab), generator=self.random)
        seen = torch.rand((rows, vocab), generator=self.random) < 0.3
        counts = torch.randint(0, 3, (rows, vocab), generator=self.random, dtype=torch.int32)
        factors = torch.rand((3, rows), generator=self.random) + 0.5
        return Call((logits, seen, counts, *factors))

    def _prepare_inputs(self, facts: Any, lens: Lens, view: bool) -> Call:
        rows = len(lens) + 2
        order = torch.randperm(rows, generator=self.random)[: len(lens)]
        starts = torch.tensor([seq - query for query, seq in lens], dtype=self.index)
        query_start = torch.tensor([0, *(q for q, _ in lens)]).cumsum(0).to(self.index)
        ids = self._ints(_tokens(lens), 100)
        ids[::3] = -1
        widest = max((-(-seq // facts["block_size"]) for _, seq in lens), default=1)
        tables = torch.randint(1, 99, (rows, widest), generator=self.random).to(self.index)
        last = self._ints(rows, 100)
        return Call((ids, order.to(self.index), query_start, starts, last, tables))

    def _lose_prepare_inputs(self, call: Call, facts: Any, lens: Lens) -> None:
        """Rows without a last token."""
        call.args[4][::2] = NO_TOKEN

    def _lose_prepare_step(self, call: Call, facts: Any, lens: Lens) -> None:
        self._lose_prepare_inputs(call, facts, lens)

    def _prepare_step(self, facts: Any, lens: Lens, view: bool) -> Call:
        args = self._prepare_inputs(facts, lens, view).args
        return Call((*args, args[5].shape[1]))

    # --- parts -----------------------------------------------------------------------------------

    def _normal(self, *shape: int, view: bool = False) -> Tensor:
        if view:  # columns of a wider tensor
            wide = torch.randn((*shape[:-2], *shape[-2:-1], 2 * shape[-1]), generator=self.random)
            return wide.to(self.dtype)[..., : shape[-1]]
        return torch.randn(shape, generator=self.random).to(self.dtype)

    def _ints(self, count: int, high: int) -> Tensor:
        return torch.randint(0, high, (count,), generator=self.random).to(self.index)

    def _heads(self, facts: Any, lens: Lens, view: bool) -> tuple[Tensor, Tensor]:
        """Queries and keys as parts of one fused projection, or tensors of their own."""
        heads, kv_heads = facts["num_heads"], facts["num_kv_heads"]
        both = self._normal(_tokens(lens), heads + 2 * kv_heads, facts["head_dim"])
        q, k, _ = both.split((heads, kv_heads, kv_heads), dim=1)
        return (q, k) if view else (q.contiguous(), k.contiguous())

    def _positions(self, lens: Lens) -> Tensor:
        parts = [torch.arange(seq - query, seq) for query, seq in lens]
        return (torch.cat(parts) if parts else torch.zeros(0)).to(self.index)

    def _cos_sin(self, facts: Any, lens: Lens) -> Tensor:
        half = facts["rotary_dim"] // 2
        angles = torch.outer(
            torch.arange(max((s for _, s in lens), default=0) + 1.0), 10000.0 ** -(torch.arange(half) / half)
        )
        return torch.cat((angles.cos(), angles.sin()), dim=-1)

    def _caches(self, facts: Any, blocks: int) -> tuple[Tensor, Tensor]:
        inner = (facts["block_size"], facts["num_kv_heads"], facts["head_dim"])
        if facts["layout"] == "HND":
            inner = (inner[1], inner[0], inner[2])
        dtype = TORCH_DTYPES[facts["kv_dtype"]]
        k, v = (torch.full((blocks, *inner), POISON).to(dtype) for _ in range(2))
        return k, v


def _tokens(lens: Lens) -> int:
    return sum(query for query, _ in lens)
