"""The sparse feed-forward layer: a router that sends each token to a few of many SwiGLU experts.

Experts that every token goes to (shared experts) and experts in a quantized form are not built.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from hotplug.core.errors import UnsupportedModelError
from hotplug.core.layers.context import BuildContext
from hotplug.core.layers.destination import Destination
from hotplug.core.weights.config import ModelConfig


class SparseMLP(nn.Module):
    """x [num_tokens, hidden] -> [num_tokens, hidden], through `experts_per_token` of `num_experts` experts."""

    def __init__(self, ctx: BuildContext, site: str, config: ModelConfig) -> None:
        super().__init__()
        if ctx.scheme is not None:
            raise UnsupportedModelError(
                f"experts quantized by {ctx.scheme.op.name} are not built", where=site, hint="Leave out --quantization."
            )
        self.hidden_size = hidden = config.hidden_size
        self.width = width = config.moe_intermediate_size
        count, top_k = config.num_experts, config.experts_per_token
        self.router = ctx.weight(count, hidden)
        self.gate_up = ctx.weight(count, 2 * width, hidden)
        self.down = ctx.weight(count, hidden, width)
        self.route = ctx.bind(
            "moe_route", f"{site}.route", hidden=hidden, num_experts=count, top_k=top_k,
            renormalize=config.norm_topk_prob,
        )  # fmt: skip
        self.experts = ctx.bind(
            "moe_experts", f"{site}.experts", hidden=hidden, width=width, num_experts=count, top_k=top_k
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.route(x, self.router)
        return self.experts(x, weights, experts, self.gate_up, self.down)

    def destinations(self, prefix: str) -> Iterator[tuple[str, Destination]]:
        """Where the checkpoint's matrices go: the router's, and three an expert."""
        yield f"{prefix}.gate.weight", self.router
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            yield f"{prefix}.experts.{expert}.gate_proj.weight", gate_up[: self.width]
            yield f"{prefix}.experts.{expert}.up_proj.weight", gate_up[self.width :]
            yield f"{prefix}.experts.{expert}.down_proj.weight", down


def unstacked(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint tensor by the names of `SparseMLP.destinations`.

    What transformers 5 holds in memory is stacked: `experts.gate_up_proj` [num_experts, 2 * width, hidden] and
    `experts.down_proj` [num_experts, hidden, width]. Hubs have a matrix an expert, which is yielded as it is.
    """
    prefix, _, kind = name.rpartition(".")
    if not prefix.endswith(".experts") or kind not in ("gate_up_proj", "down_proj") or tensor.dim() != 3:
        yield name, tensor
        return
    for expert, matrix in enumerate(tensor):
        parts = {"gate_proj": matrix, "up_proj": matrix} if kind == "gate_up_proj" else {"down_proj": matrix}
        rows = matrix.split(-(-len(matrix) // len(parts)))
        for part, block in zip(parts, rows, strict=True):
            yield f"{prefix}.{expert}.{part}.weight", block
