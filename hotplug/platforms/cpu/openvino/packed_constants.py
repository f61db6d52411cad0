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

    from hotplug.platforms.cpu.openvino.graph import Graph, Weight

GROUP, TILE = 32, 16
BYTES = {18: "q4_0", 20: "q4_1", 34: "q8_0"}
"""Of a group, by format."""


def linear_packed(graph: Graph, site: str, x: Output, data: Weight, bias: Weight | None) -> Output:
    width = x.get_partial_shape()[-1].get_length()
    product = op.matmul(x, graph.once(("packed", data.tensor.data_ptr()), lambda: _matrix(graph, data, width, site)),
                        False, True)  # fmt: skip
    return (product if bias is None else op.add(product, bias.output)).output(0)


def embed_packed(graph: Graph, site: str, token_ids: Output, data: Weight, hidden: int) -> Output:
    """Rows are gathered first and dequantized then."""
    table = graph.once(("table", data.tensor.data_ptr()), lambda: _table(graph, data, hidden, site))
    weights, scale, zero = (
        x if x is None or x.get_shape()[0] == 1 else op.gather(x, token_ids, graph.ints(0)).output(0) for x in table
    )
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
        values = op.subtract(values, zero if zero.get_element_type() == ov.Type.f32 else op.convert(zero, ov.Type.f32))
    values = op.multiply(values, scale)
    return op.reshape(values, graph.ints(-1, width), False).output(0)


def _table(graph: Graph, data: Weight, width: int, site: str) -> tuple[Any, ...]:
    return _parts(graph, data.tensor, width, site, packed=False)


def _parts(graph: Graph, data: Tensor, width: int, site: str, *, packed: bool) -> tuple[Output, Output, Output | None]:
    """Weights [rows, groups, 32] and scales [rows, groups, 1] of a matrix; zeros of the same shape, or one for all, of
    the type that kernels know best; none where all are 0.

    With `packed`, 4-bit weights are two to a byte.
    """
    array, count = data.detach().numpy(), width // GROUP
    rows = len(array) if array.ndim == 2 else len(array) * TILE
    scheme = BYTES.get(array.size // (rows * count))
    if scheme is None:
        raise PlatformError(f"no format has {array.size / (rows * count):g} bytes a group", where=site)
    scale, least, weights = (_of_rows if array.ndim == 2 else _of_tiles)(array.reshape(-1), rows, count, scheme)
    scales = graph.array(scale.astype(np.float32))
    if scheme == "q8_0":
        return graph.array(weights.view(np.int8)), scales, None
    if least is None:
        zero = graph.array(np.full((1, 1, 1), 8, np.uint8))
    else:
        scale, least = scale.astype(np.float32), least.astype(np.float32)
        zero = graph.array(np.divide(-least, scale, out=np.zeros_like(scale), where=scale != 0))
    if packed:
        return graph.array(weights[..., ::2] | weights[..., 1::2] << 4, ov.Type.u4), scales, zero
    return graph.array(weights), scales, zero


_Parts = tuple[np.ndarray, np.ndarray | None, np.ndarray]
"""Float16 scales and minima [rows, groups, 1], the latter of Q4_1 alone, and bytes [rows, groups, 32] of weights."""


def _of_rows(data: np.ndarray, rows: int, count: int, scheme: str) -> _Parts:
    """Of groups as a file has them, row by row (`hotplug.core.quant.packed_scheme`)."""
    groups = data.reshape(rows, count, -1)
    start = 4 if scheme == "q4_1" else 2
    heads = np.ascontiguousarray(groups[..., :start]).view(np.float16)
    weights = groups[..., start:]
    if scheme != "q8_0":
        weights = np.concatenate((weights & 15, weights >> 4), -1)
    return heads[..., :1], heads[..., 1:] if scheme == "q4_1" else None, np.ascontiguousarray(weights)


def _of_tiles(data: np.ndarray, rows: int, count: int, scheme: str) -> _Parts:
    """Of groups of 16 rows at a time, as the native kernels read them (`native/src/kernels.h`)."""
    groups = data.reshape(rows // TILE, count, -1)
    start = 4 * TILE if scheme == "q4_1" else 2 * TILE
    heads = np.ascontiguousarray(groups[..., :start]).view(np.float16).reshape(rows // TILE, count, -1, TILE)
    heads = heads.transpose(2, 0, 3, 1).reshape(-1, rows, count, 1)
    lines = groups[..., start:].reshape(rows // TILE, count, -1, TILE, 4)  # byte 4 r + j of line l
    weights = lines.transpose(0, 3, 1, 2, 4).reshape(rows, count, -1)
    if scheme != "q8_0":
        weights = np.concatenate((weights & 15, weights >> 4), -1)
    return heads[0], heads[1] if scheme == "q4_1" else None, np.ascontiguousarray(weights)
