"""Matrices in GGUF's groups, taken apart into weights, scales and minima, which OpenVINO keeps as they are.

A product with `(convert(weights) - zero) * scale` is computed by kernels of compressed weights. Q4_1's value `scale q +
min` is the same with `zero = -min / scale`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
from openvino import opset15 as op
from torch import Tensor

from hotplug.vendor import PlatformError

if TYPE_CHECKING:
    from openvino import Output

    from hotplug.platforms.cpu.openvino.build import Graph, Weight

GROUP = 32
BYTES = {18: "q4_0", 20: "q4_1", 34: "q8_0"}
"""Of a group, by format."""


def linear_stored(graph: Graph, site: str, x: Output, data: Weight, bias: Weight | None) -> Output:
    width = x.get_partial_shape()[-1].get_length()
    product = op.matmul(x, graph.once(("stored", data.tensor.data_ptr()), lambda: _matrix(graph, data, width, site)),
                        False, True)  # fmt: skip
    return (product if bias is None else op.add(product, bias.output)).output(0)


def embed_stored(graph: Graph, site: str, token_ids: Output, data: Weight, hidden: int) -> Output:
    """Rows are gathered first and dequantized then."""
    table = graph.once(("table", data.tensor.data_ptr()), lambda: _table(graph, data, hidden, site))
    weights, scale, zero = (None if x is None else op.gather(x, token_ids, graph.ints(0)) for x in table)
    values = op.convert(weights, ov.Type.f32)
    if zero is not None:
        values = op.subtract(values, op.convert(zero, ov.Type.f32))
    values = op.multiply(values, op.convert(scale, ov.Type.f32))
    return op.reshape(values, graph.ints(0, hidden), True).output(0)


def _matrix(graph: Graph, data: Weight, width: int, site: str) -> Output:
    """float32 [rows, width] in the form that the plugin takes for compressed."""
    weights, scale, zero = _parts(graph, data.tensor, width, site, packed=True)
    values = op.convert(weights, ov.Type.f32)
    if zero is not None:
        values = op.subtract(values, zero)
    values = op.multiply(values, scale)
    return op.reshape(values, graph.ints(-1, width), False).output(0)


def _table(graph: Graph, data: Weight, width: int, site: str) -> tuple[Any, ...]:
    return _parts(graph, data.tensor, width, site, packed=False)


def _parts(graph: Graph, data: Tensor, width: int, site: str, *, packed: bool) -> tuple[Output, Output, Output | None]:
    """Weights [rows, groups, 32], scales and zeros [rows, groups, 1] of a matrix; no zeros where all are 0."""
    count = width // GROUP
    groups = data.detach().numpy().reshape(len(data), count, -1)
    scheme = BYTES.get(groups.shape[-1])
    scale = np.ascontiguousarray(groups[..., :2]).view(np.float16).astype(np.float32)
    if scheme == "q8_0":
        return graph.array(np.ascontiguousarray(groups[..., 2:]).view(np.int8)), graph.array(scale), None
    if scheme is None:
        raise PlatformError(f"no format has {groups.shape[-1]} bytes a group", where=site)
    packed_pairs = groups[..., 4 if scheme == "q4_1" else 2 :]
    low, high = packed_pairs & 15, packed_pairs >> 4
    nibbles = np.concatenate((low, high), -1)
    if scheme == "q4_0":
        zero = np.full_like(scale, 8)
    else:
        least = np.ascontiguousarray(groups[..., 2:4]).view(np.float16).astype(np.float32)
        zero = np.divide(-least, scale, out=np.zeros_like(scale), where=scale != 0)
    if packed:
        weights = graph.array(nibbles[..., ::2] | nibbles[..., 1::2] << 4, ov.Type.u4)
    else:
        weights = graph.array(nibbles)
    return weights, graph.array(scale), graph.array(zero)
