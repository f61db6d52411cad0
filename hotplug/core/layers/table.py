"""The vocabulary's tables: embedding and head, in floating point or in groups as the checkpoint stores them."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from hotplug.core.errors import ModelError
from hotplug.core.layers.context import BuildContext
from hotplug.core.layers.dense import Embedding
from hotplug.core.layers.destination import Destination
from hotplug.core.quant.scheme import NONE
from hotplug.core.quant.stored import StoredRows, StoredScheme


class StoredEmbedding(nn.Module):
    """`Embedding` with its table in groups."""

    def __init__(self, ctx: BuildContext, scheme: StoredScheme, site: str, vocab: int, hidden: int) -> None:
        super().__init__()
        self._hidden, self._dtype = hidden, ctx.dtype
        self.scheme = scheme
        self.weight = scheme.parameter(vocab, hidden, ctx.device)
        self.op = ctx.bind("embed_stored", site, vocab=vocab, hidden=hidden, scheme=scheme.name)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.op(token_ids, self.weight, self._hidden).to(self._dtype)


class Head(nn.Module):
    """Hidden states [num_rows, hidden] to float32 scores [num_rows, vocab]; `tied` to an embedding or not."""

    def __init__(
        self, ctx: BuildContext, site: str, hidden: int, vocab: int, tied: Embedding | StoredEmbedding | None
    ) -> None:
        super().__init__()
        self.site = site
        self.scheme = scheme = ctx.table_scheme_at(site) if tied is None else tied.scheme
        if tied is not None:
            self.weight = tied.weight
        elif scheme is not None:
            self.weight = scheme.parameter(vocab, hidden, ctx.device)
        else:
            self.weight = ctx.weight(vocab, hidden)
        name, stored = ("logits", NONE) if scheme is None else ("logits_stored", scheme.name)
        self.op = ctx.bind(name, site, hidden=hidden, vocab=vocab, bias=False, scheme=stored)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.op(hidden, self.weight, None)


def make_embedding(ctx: BuildContext, site: str, vocab: int, hidden: int) -> Embedding | StoredEmbedding:
    """The embedding as the context has tables stored."""
    scheme = ctx.table_scheme_at(site)
    if scheme is None:
        return Embedding(ctx, site, vocab, hidden)
    return StoredEmbedding(ctx, scheme, site, vocab, hidden)


def table_place(table: nn.Module, hidden: int) -> Destination:
    """Where the checkpoint's table goes. `table` is one of the above, or a module of a plugin's model around one.

    Raises ModelError for a module that hides how its table is stored.
    """
    weight, scheme = cast("Tensor", table.weight), getattr(table, "scheme", None)
    if scheme is not None:
        return StoredRows(scheme, [weight], hidden)
    if not weight.is_floating_point():
        raise ModelError("its weight is in groups, and it does not say in which", where=type(table).__name__,
                         hint="Give it the `scheme` of what it wraps, or run with --quantization none.")  # fmt: skip
    return weight
