"""The vocabulary's tables: embedding and head, in floating point or in groups as the checkpoint stores them."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from hotplug.core.errors import ModelError
from hotplug.core.layers.context import BuildContext
from hotplug.core.layers.dense import Embedding
from hotplug.core.layers.destination import Destination
from hotplug.core.quant.packed_scheme import PackedRows, PackedScheme
from hotplug.core.quant.scheme import NONE


class PackedEmbedding(nn.Module):
    """`Embedding` with its table in groups."""

    def __init__(self, ctx: BuildContext, scheme: PackedScheme, site: str, vocab: int, hidden: int) -> None:
        super().__init__()
        self._dtype = ctx.dtype
        self.scheme = scheme
        self.weight = scheme.parameter(vocab, hidden, ctx.device)
        self.op = ctx.bind("embed_packed", site, vocab=vocab, hidden=hidden, scheme=scheme.name)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.op(token_ids, self.weight).to(self._dtype)


class SplitEmbedding(nn.Module):
    """An embedding of which each rank has a part of the vocabulary: `part`, with `rows` of it."""

    def __init__(self, ctx: BuildContext, site: str, part: Embedding | PackedEmbedding, rows: int, hidden: int) -> None:
        super().__init__()
        self.part = part
        self._first, self._rows = ctx.rank * rows, rows
        self._sum = ctx.bind("all_reduce", f"{site}.sum", width=hidden, group="tp", ranks=ctx.ranks)

    @property
    def weight(self) -> nn.Parameter:
        return self.part.weight

    @property
    def scheme(self) -> PackedScheme | None:
        return self.part.scheme

    def forward(self, token_ids: Tensor) -> Tensor:
        """Of each token one rank has the vector, all others give zeros."""
        at = token_ids - self._first
        elsewhere = (at < 0) | (at >= self._rows)
        found: Tensor = self.part(at.masked_fill(elsewhere, 0))
        total: Tensor = self._sum(found.masked_fill(elsewhere.unsqueeze(-1), 0))
        return total


class Head(nn.Module):
    """Hidden states [num_rows, hidden] to float32 scores [num_rows, vocab]; `tied` to an embedding or not.

    With several ranks each computes the scores of its part of the vocabulary, and all get those of all.
    """

    def __init__(self, ctx: BuildContext, site: str, hidden: int, vocab: int, tied: AnyEmbedding | None) -> None:
        super().__init__()
        vocab //= ctx.ranks
        self.gather = None
        if ctx.ranks > 1:
            self.gather = ctx.bind("all_gather", f"{site}.gather", width=vocab, group="tp", ranks=ctx.ranks)
        self.site = site
        self.scheme = scheme = ctx.table_scheme_at(site) if tied is None else tied.scheme
        if tied is not None:
            self.weight = tied.weight
        elif scheme is not None:
            self.weight = scheme.parameter(vocab, hidden, ctx.device)
        else:
            self.weight = ctx.weight(vocab, hidden)
        name, stored = ("logits", NONE) if scheme is None else ("logits_packed", scheme.name)
        self.op = ctx.bind(name, site, hidden=hidden, vocab=vocab, bias=False, scheme=stored)

    def forward(self, hidden: Tensor) -> Tensor:
        scores: Tensor = self.op(hidden, self.weight, None)
        return scores if self.gather is None else self.gather(scores)


AnyEmbedding = Embedding | PackedEmbedding | SplitEmbedding


def make_embedding(ctx: BuildContext, site: str, vocab: int, hidden: int) -> AnyEmbedding:
    """The embedding as the context has tables stored, or a rank's part of it."""
    scheme, rows = ctx.table_scheme_at(site), vocab // ctx.ranks
    args = (site, rows, hidden)
    table = Embedding(ctx, *args) if scheme is None else PackedEmbedding(ctx, scheme, *args)
    return table if ctx.ranks == 1 else SplitEmbedding(ctx, site, table, rows, hidden)


def table_destination(table: nn.Module, hidden: int) -> Destination:
    """Where the checkpoint's table goes. `table` is one of the above, or a module of a plugin's model around one.

    Raises ModelError for a module that hides how its table is stored.
    """
    weight, scheme = cast("Tensor", table.weight), getattr(table, "scheme", None)
    if scheme is not None:
        return PackedRows(scheme, [weight], hidden)
    if not weight.is_floating_point():
        raise ModelError("its weight is in groups, and it does not say in which", where=type(table).__name__,
                         hint="Give it the `scheme` of what it wraps, or run with --quantization none.")  # fmt: skip
    return weight
