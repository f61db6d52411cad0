"""One function an operation: what OpenVINO computes it with.

Normalization, rotation and dequantization are written in the forms that OpenVINO's CPU plugin fuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
from openvino import opset15 as op

from hotplug.platforms.cpu.openvino.attention import attention, kv_write
from hotplug.platforms.cpu.openvino.packed_constants import embed_packed, linear_packed

if TYPE_CHECKING:
    from openvino import Output

    from hotplug.platforms.cpu.openvino.graph import Graph, Weight


def embed(graph: Graph, site: str, token_ids: Output, weight: Weight) -> Output:
    return op.gather(weight.output, token_ids, graph.ints(0)).output(0)


def linear(graph: Graph, site: str, x: Output, weight: Weight, bias: Weight | None) -> Output:
    product = op.matmul(x, weight.output, False, True)
    return (product if bias is None else op.add(product, bias.output)).output(0)


def rms_norm(graph: Graph, site: str, x: Output, weight: Weight, eps: float) -> Output:
    squares = op.reduce_mean(op.power(x, graph.scalar(2.0, ov.Type.f32)), graph.ints(-1), True)
    root = op.sqrt(op.add(squares, graph.scalar(eps, ov.Type.f32)))
    scaled = op.multiply(x, op.divide(graph.scalar(1.0, ov.Type.f32), root))
    return op.multiply(scaled, weight.output).output(0)


def add_rms_norm(
    graph: Graph, site: str, x: Output, residual: Output, weight: Weight, eps: float
) -> tuple[Output, Output]:
    total = op.add(x, residual).output(0)
    return rms_norm(graph, site, total, weight, eps), total


def silu_mul(graph: Graph, site: str, gate_up: Output) -> Output:
    half = gate_up.get_partial_shape()[-1].get_length() // 2
    gate, up = op.variadic_split(gate_up, graph.ints(-1), graph.ints(half, half)).outputs()
    return op.multiply(op.swish(gate), up).output(0)


def gelu_tanh_mul(graph: Graph, site: str, gate_up: Output) -> Output:
    half = gate_up.get_partial_shape()[-1].get_length() // 2
    gate, up = op.variadic_split(gate_up, graph.ints(-1), graph.ints(half, half)).outputs()
    return op.multiply(op.gelu(gate, "TANH"), up).output(0)


def linear_silu_mul(graph: Graph, site: str, x: Output, weight: Weight, bias: Weight | None) -> Output:
    return silu_mul(graph, site, linear(graph, site, x, weight, bias))


def linear_packed_silu_mul(graph: Graph, site: str, x: Output, data: Weight, bias: Weight | None) -> Output:
    return silu_mul(graph, site, linear_packed(graph, site, x, data, bias))


def rope(graph: Graph, site: str, q: Output, k: Output, positions: Output, cos_sin: Weight) -> tuple[Output, Output]:
    cos, sin = graph.once(("angles", cos_sin.tensor.data_ptr()), lambda: _angles(graph, positions, cos_sin))
    return _rotated(graph, q, cos, sin), _rotated(graph, k, cos, sin)


def _angles(graph: Graph, positions: Output, cos_sin: Weight) -> tuple[Output, Output]:
    """Cosines and sines [tokens, 1, 1, rotary_dim] of a step's positions, each half twice."""
    table = cos_sin.tensor.numpy()
    half = table.shape[1] // 2
    found = []
    for part in (table[:, :half], table[:, half:]):
        both = graph.array(np.concatenate((part, part), 1)[:, None, None, :])
        found.append(op.gather(both, positions, graph.ints(0)).output(0))
    return found[0], found[1]


def _rotated(graph: Graph, x: Output, cos: Output, sin: Output) -> Output:
    """`x` [tokens, heads, head_dim] rotated in its first rotary_dim dimensions."""
    heads, dim = (x.get_partial_shape()[i].get_length() for i in (1, 2))
    rotary = cos.get_partial_shape()[-1].get_length()
    x = op.reshape(x, graph.ints(0, heads, 1, dim), True).output(0)
    rest = None
    if rotary < dim:
        x, rest = op.variadic_split(x, graph.ints(-1), graph.ints(rotary, dim - rotary)).outputs()
    # The axis counts from the front, as the plugin's fusion of rotations looks for it.
    first, second = op.variadic_split(x, graph.scalar(3, ov.Type.i64), graph.ints(rotary // 2, rotary // 2)).outputs()
    turned = op.concat([op.multiply(second, graph.scalar(-1.0, ov.Type.f32)), first], -1)
    rotated = op.add(op.multiply(x, cos), op.multiply(turned, sin)).output(0)
    if rest is not None:
        rotated = op.concat([rotated, rest], -1).output(0)
    return op.reshape(rotated, graph.ints(0, heads, dim), True).output(0)


def qk_norm_rope(
    graph: Graph, site: str, q: Output, k: Output, q_weight: Weight, k_weight: Weight, eps: float,
    positions: Output, cos_sin: Weight,
) -> tuple[Output, Output]:  # fmt: skip
    q, k = rms_norm(graph, site, q, q_weight, eps), rms_norm(graph, site, k, k_weight, eps)
    return rope(graph, site, q, k, positions, cos_sin)


def rope_kv_write(
    graph: Graph, site: str, q: Output, k: Output, v: Output, positions: Output, cos_sin: Weight, *place: Any
) -> tuple[Any, ...]:
    q, k = rope(graph, site, q, k, positions, cos_sin)
    return q, *kv_write(graph, site, k, v, *place)


def qk_norm_rope_kv_write(
    graph: Graph, site: str, q: Output, k: Output, v: Output, q_weight: Weight, k_weight: Weight, eps: float,
    positions: Output, cos_sin: Weight, *place: Any,
) -> tuple[Any, ...]:  # fmt: skip
    q, k = qk_norm_rope(graph, site, q, k, q_weight, k_weight, eps, positions, cos_sin)
    return q, *kv_write(graph, site, k, v, *place)


def reshape(graph: Graph, site: str, x: Output, sizes: list[int]) -> Output:
    """0 is the source's size at the same place."""
    return op.reshape(x, graph.ints(*sizes), True).output(0)


def split(graph: Graph, site: str, x: Output, sizes: list[int], dim: int = 0) -> list[Output]:
    return op.variadic_split(x, graph.ints(dim), graph.ints(*sizes)).outputs()


def select(graph: Graph, site: str, x: Output, indices: list[Any]) -> Output:
    (rows,) = indices
    return op.gather(x, rows, graph.ints(0)).output(0)


def add(graph: Graph, site: str, x: Output, y: Output | float) -> Output:
    return op.add(x, _operand(graph, x, y)).output(0)


def multiply(graph: Graph, site: str, x: Output, y: Output | float) -> Output:
    return op.multiply(x, _operand(graph, x, y)).output(0)


def _operand(graph: Graph, x: Output, y: Output | float) -> Output:
    """`y`, as a constant of the type of `x` where it is a number."""
    return graph.scalar(y, x.get_element_type()) if isinstance(y, int | float) else y


def item(graph: Graph, site: str, values: Any, index: int) -> Any:
    return values[index]


TRANSLATIONS = {
    "hotplug::embed": embed,
    "hotplug::embed_packed": embed_packed,
    "hotplug::linear": linear,
    "hotplug::linear_packed": linear_packed,
    "hotplug::logits": linear,
    "hotplug::logits_packed": linear_packed,
    "hotplug::rms_norm": rms_norm,
    "hotplug::add_rms_norm": add_rms_norm,
    "hotplug::silu_mul": silu_mul,
    "hotplug::gelu_tanh_mul": gelu_tanh_mul,
    "hotplug::linear_silu_mul": linear_silu_mul,
    "hotplug::linear_packed_silu_mul": linear_packed_silu_mul,
    "hotplug::rope": rope,
    "hotplug::qk_norm_rope": qk_norm_rope,
    "hotplug::kv_write": kv_write,
    "hotplug::rope_kv_write": rope_kv_write,
    "hotplug::qk_norm_rope_kv_write": qk_norm_rope_kv_write,
    "hotplug::attention": attention,
    "aten::index.Tensor": select,
    "aten::split_with_sizes": split,
    "aten::add.Tensor": add,
    "aten::mul.Tensor": multiply,
    "getitem": item,
    "reshape": reshape,
}
