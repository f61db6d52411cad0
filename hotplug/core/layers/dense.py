"""Embedding, linear and normalization layers."""

from __future__ import annotations

from torch import Tensor, nn

from hotplug.core.layers.context import BuildContext


class Embedding(nn.Module):
    """Token ids [num_tokens] to vectors [num_tokens, hidden]."""

    def __init__(self, ctx: BuildContext, site: str, vocab: int, hidden: int) -> None:
        super().__init__()
        self.weight = ctx.weight(vocab, hidden)
        self.op = ctx.bind("embed", site, vocab=vocab, hidden=hidden)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.op(token_ids, self.weight)


class Linear(nn.Module):
    """x [num_tokens, in] to [num_tokens, out]. Several checkpoint matrices may be stacked along `out`."""

    def __init__(self, ctx: BuildContext, site: str, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.site = site
        self.weight = ctx.weight(out_features, in_features)
        self.bias = ctx.weight(out_features) if bias else None
        self.op = ctx.bind("linear", site, in_features=in_features, out_features=out_features, bias=bias, scheme="none")

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square normalization of [num_tokens, width]."""

    def __init__(self, ctx: BuildContext, site: str, width: int, eps: float) -> None:
        super().__init__()
        self.weight = ctx.weight(width)
        self.eps = eps
        self.op = ctx.bind("rms_norm", site, width=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.weight, self.eps)


class AddRMSNorm(nn.Module):
    """Adds the residual, then normalizes; returns the normalized sum and the sum."""

    def __init__(self, ctx: BuildContext, site: str, width: int, eps: float) -> None:
        super().__init__()
        self.weight = ctx.weight(width)
        self.eps = eps
        self.op = ctx.bind("add_rms_norm", site, width=width)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self.op(x, residual, self.weight, self.eps)
