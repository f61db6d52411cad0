"""The gated feed-forward layer: SwiGLU, or what the model's activation makes of it."""

from __future__ import annotations

from torch import Tensor, nn

from hotplug.core.layers.context import BuildContext
from hotplug.core.layers.dense import GateUp, Linear, QuantizedLinear, make_gate_up, make_linear
from hotplug.core.weights.config import ModelConfig


class GatedMLP(nn.Module):
    """x [num_tokens, hidden] -> [num_tokens, hidden], through `intermediate_size`."""

    def __init__(self, ctx: BuildContext, site: str, config: ModelConfig) -> None:
        super().__init__()
        self.hidden_size = hidden = config.hidden_size
        self.width = width = config.intermediate_size
        self.down = make_linear(ctx, f"{site}.down", width, hidden, bias=config.mlp_bias)
        gated = None
        if config.activation == "silu":
            gated = make_gate_up(ctx, f"{site}.gate_up", hidden, width, bias=config.mlp_bias)
        self.gate_up: Linear | QuantizedLinear | GateUp
        self.gate = None
        if gated is not None:
            self.gate_up = gated
        else:
            self.gate_up = make_linear(ctx, f"{site}.gate_up", hidden, 2 * width, bias=config.mlp_bias)
            self.gate = ctx.bind(f"{config.activation}_mul", f"{site}.act", width=width)

    def forward(self, x: Tensor) -> Tensor:
        gated = self.gate_up(x)
        return self.down(gated if self.gate is None else self.gate(gated))
