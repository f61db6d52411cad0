"""Embedding, linear and normalization layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hotplug.core.layers.context import BuildContext
from hotplug.core.layers.destination import Destination
from hotplug.core.quant.packed_scheme import PackedRows, PackedScheme
from hotplug.core.quant.scheme import NONE, QuantizedRows, QuantScheme


class Embedding(nn.Module):
    """Token ids [num_tokens] to vectors [num_tokens, hidden]."""

    def __init__(self, ctx: BuildContext, site: str, vocab: int, hidden: int) -> None:
        super().__init__()
        self.scheme = None
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
        self.op = ctx.bind("linear", site, in_features=in_features, out_features=out_features, bias=bias, scheme=NONE)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.weight, self.bias)

    def rows(self, sizes: Sequence[int]) -> Sequence[Destination]:
        """Destinations of the checkpoint matrices that are stacked here, `sizes` rows each."""
        return torch.split(self.weight, list(sizes))


class LinearSiluMul(nn.Module):
    """x [num_tokens, in] to [num_tokens, width]: the gate and up projections of SwiGLU, stacked, and the gating."""

    def __init__(self, ctx: BuildContext, site: str, in_features: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.site = site
        self.weight = ctx.weight(2 * width, in_features)
        self.bias = ctx.weight(2 * width) if bias else None
        self.op = ctx.bind("linear_silu_mul", site, in_features=in_features, width=width, bias=bias, scheme=NONE)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.weight, self.bias)

    def rows(self, sizes: Sequence[int]) -> Sequence[Destination]:
        """Destinations of the checkpoint matrices that are stacked here, `sizes` rows each."""
        return torch.split(self.weight, list(sizes))


class QuantizedLinear(nn.Module):
    """`Linear` with its weight stored as a quantization scheme has it."""

    def __init__(
        self, ctx: BuildContext, scheme: QuantScheme, site: str, in_features: int, out_features: int, *, bias: bool
    ) -> None:
        super().__init__()
        self.site = site
        self._scheme, self._in_features, self._dtype = scheme, in_features, ctx.dtype
        self.stored = nn.ParameterList(
            nn.Parameter(torch.empty(shape, dtype=dtype, device=ctx.device), requires_grad=False)
            for shape, dtype in scheme.tensors(out_features, in_features).values()
        )
        self.bias = ctx.weight(out_features) if bias else None
        facts = {"scheme": scheme.name} if isinstance(scheme, PackedScheme) else {}
        self.op = ctx.bind(scheme.op.name, site, in_features=in_features, out_features=out_features, bias=bias, **facts)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, *self.stored, self.bias)

    def rows(self, sizes: Sequence[int]) -> Sequence[Destination]:
        """Destinations that quantize the checkpoint matrices that are stacked here, `sizes` rows each."""
        scheme = self._scheme
        whole = len(sizes) == 1
        parts = [tuple(self.stored)] if whole else zip(*(t.split(list(sizes)) for t in self.stored), strict=True)
        if isinstance(scheme, PackedScheme):
            return [PackedRows(scheme, part, self._in_features) for part in parts]
        return [QuantizedRows(scheme, part, self._in_features, self._dtype) for part in parts]


class PackedLinearSiluMul(nn.Module):
    """`LinearSiluMul` with its weight in groups as the checkpoint stores them."""

    def __init__(
        self, ctx: BuildContext, scheme: PackedScheme, site: str, in_features: int, width: int, *, bias: bool
    ) -> None:
        super().__init__()
        self.site = site
        self._scheme, self._in_features = scheme, in_features
        self.weight = scheme.parameter(2 * width, in_features, ctx.device)
        self.bias = ctx.weight(2 * width) if bias else None
        self.op = ctx.bind(
            "linear_packed_silu_mul", site, in_features=in_features, width=width, bias=bias, scheme=scheme.name
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.weight, self.bias)

    def rows(self, sizes: Sequence[int]) -> Sequence[Destination]:
        """Destinations of the packed checkpoint matrices that are stacked here, `sizes` rows each."""
        parts = [self.weight] if len(sizes) == 1 else torch.split(self.weight, list(sizes))
        return [PackedRows(self._scheme, [part], self._in_features) for part in parts]


GateUp = LinearSiluMul | PackedLinearSiluMul
"""Gate and up projection with the gating in one op."""


def make_gate_up(ctx: BuildContext, site: str, in_features: int, width: int, *, bias: bool) -> GateUp | None:
    """SwiGLU's gate and up projection as the context has it stored; None where its scheme has no op for both."""
    scheme = ctx.scheme_at(site)
    if scheme is None:
        return LinearSiluMul(ctx, site, in_features, width, bias=bias)
    if isinstance(scheme, PackedScheme):
        return PackedLinearSiluMul(ctx, scheme, site, in_features, width, bias=bias)
    return None


def make_linear(
    ctx: BuildContext, site: str, in_features: int, out_features: int, *, bias: bool
) -> Linear | QuantizedLinear:
    """A linear layer as the context has it stored."""
    scheme = ctx.scheme_at(site)
    if scheme is None:
        return Linear(ctx, site, in_features, out_features, bias=bias)
    return QuantizedLinear(ctx, scheme, site, in_features, out_features, bias=bias)


class RMSNorm(nn.Module):
    """Root-mean-square normalization of [num_tokens, width]."""

    def __init__(self, ctx: BuildContext, site: str, width: int, eps: float) -> None:
        super().__init__()
        self.weight = ctx.weight(width)
        self.op = ctx.bind("rms_norm", site, width=width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.weight)


class AddRMSNorm(nn.Module):
    """Adds the residual, then normalizes; returns the normalized sum and the sum.

    With several ranks, what comes in is a part of a sum over all of them, which is added up first.
    """

    def __init__(self, ctx: BuildContext, site: str, width: int, eps: float, *, reduce: bool = True) -> None:
        """`reduce`: what comes in is a part of a sum, if there are several ranks."""
        super().__init__()
        self.weight = ctx.weight(width)
        if ctx.ranks == 1 or not reduce:
            self.op = ctx.bind("add_rms_norm", site, width=width, eps=eps)
        else:
            self.op = ctx.bind("all_reduce_add_norm", site, width=width, eps=eps, group="tp", ranks=ctx.ranks)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self.op(x, residual, self.weight)


class ReduceRMSNorm(nn.Module):
    """Normalizes [num_tokens, width]; with several ranks, the sum of what comes in over all of them."""

    def __init__(self, ctx: BuildContext, site: str, width: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(ctx, site, width, eps)
        self.reduce = None
        if ctx.ranks > 1:
            self.reduce = ctx.bind("all_reduce", f"{site}.sum", width=width, group="tp", ranks=ctx.ranks)

    @property
    def weight(self) -> Tensor:
        return self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        normalized: Tensor = self.norm(x if self.reduce is None else self.reduce(x))
        return normalized
