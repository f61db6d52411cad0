"""Products with quantized and with float32 weights by the native library, as functions of torch tensors on the host.

A weight is packed once from the groups of a GGUF file, whose values it keeps; the layout is in `src/kernels.h`.
Activations are quantized to int8 on the way in, each group of 32 by its largest magnitude. A row of activations that
holds a value which is not finite gives a row of NaN. Wrong arguments raise ValueError, and a missing library
PlatformError.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hotplug.platforms.cpu.native.library import call, checked, load

KINDS = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 8}
"""What can be packed, and GGUF's number for it."""
GROUP = 32
"""Inputs that share a scale."""
TILE = 16
"""Outputs that are interleaved."""

_SOURCE_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
_PACKED_BYTES = {kind: TILE * size for kind, size in _SOURCE_BYTES.items()}
_call = struct.Struct("@4P6q").pack
"""`hp_linear_call`, and `hp_linear_f32_call`."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A weight [rows, cols] in the kernels' layout."""

    kind: str
    rows: int
    cols: int
    tiles: Tensor
    """[ceil(rows / 16), bytes of a tile] uint8, contiguous; tiles can be split and concatenated."""


def packed_shape(kind: str, rows: int, cols: int) -> tuple[int, int]:
    """Shape of `Packed.tiles`. Raises ValueError for a kind or a size that is not packed."""
    if kind not in KINDS:
        raise ValueError(f"{kind} is not packed, only {', '.join(KINDS)}")
    if rows < 1:
        raise ValueError(f"a weight has at least one row, not {rows}")
    if cols < 1 or cols % GROUP:
        raise ValueError(f"{cols} inputs are no multiple of {GROUP}, the group of {kind}")
    return -(-rows // TILE), cols // GROUP * _PACKED_BYTES[kind]


def pack(kind: str, raw: npt.NDArray[np.uint8], rows: int, cols: int, out: Tensor | None = None) -> Packed:
    """`raw` bytes of a GGUF tensor [rows, cols], of any shape, contiguous and possibly read-only or mapped.

    With `out`, uint8 of `packed_shape`, into memory that is there already: some tiles of a larger weight.
    """
    shape = packed_shape(kind, rows, cols)
    needed = rows * cols // GROUP * _SOURCE_BYTES[kind]
    if raw.dtype != np.uint8 or raw.nbytes != needed or not raw.flags.c_contiguous:
        raise ValueError(f"{kind} of [{rows}, {cols}] is {needed} contiguous bytes, not {raw.nbytes} of {raw.dtype}")
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8)
    elif tuple(out.shape) != shape or out.dtype != torch.uint8 or not (out.is_cpu and out.is_contiguous()):
        raise ValueError(f"out must be contiguous uint8 of {list(shape)} on the host, not {_kind_of(out)}")
    checked(load().c.hp_pack(KINDS[kind], raw.ctypes.data, rows, cols, out.data_ptr()), "hp_pack")
    return Packed(kind, rows, cols, out)


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """`x` float32 [n, cols] times the weight transposed plus `bias` float32 [rows]; float32 [n, rows]."""
    n, stride = _rows_of(x, weight.cols)
    out = x.new_empty((n, weight.rows))
    call("hp_linear", _call(
        weight.tiles.data_ptr(), x.data_ptr(), _bias(bias, weight.rows), out.data_ptr(),
        KINDS[weight.kind], weight.rows, weight.cols, n, stride, weight.rows,
    ))  # fmt: skip
    return out


def linear_silu_mul(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """`linear` to 2 width outputs, then silu of the first half times the second: float32 [n, width].

    The width is a multiple of 16.
    """
    width, odd = divmod(weight.rows, 2)
    if odd or width % TILE:
        raise ValueError(f"gate and up of {weight.rows} rows together are not twice a multiple of {TILE}")
    n, stride = _rows_of(x, weight.cols)
    out = x.new_empty((n, width))
    call("hp_linear_silu_mul", _call(
        weight.tiles.data_ptr(), x.data_ptr(), _bias(bias, weight.rows), out.data_ptr(),
        KINDS[weight.kind], width, weight.cols, n, stride, width,
    ))  # fmt: skip
    return out


def linear_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [n, cols] times `weight` [rows, cols] transposed plus `bias` [rows], all float32; made for small n."""
    rows, cols = weight.shape
    if weight.dtype != torch.float32 or not weight.is_cpu or (cols > 1 and weight.stride(1) != 1):
        raise ValueError(f"the weight must be float32 on the host with neighbouring inputs, not {_kind_of(weight)}")
    n, stride = _rows_of(x, cols)
    out = x.new_empty((n, rows))
    call("hp_linear_f32", _call(
        weight.data_ptr(), x.data_ptr(), _bias(bias, rows), out.data_ptr(),
        weight.stride(0), rows, cols, n, stride, rows,
    ))  # fmt: skip
    return out


def _rows_of(x: Tensor, cols: int) -> tuple[int, int]:
    """Rows of the activations and the distance between them."""
    if x.dtype != torch.float32 or x.ndim != 2 or not x.is_cpu:
        raise ValueError(f"activations must be float32 [n, {cols}] on the host, not {_kind_of(x)}")
    n, width = x.shape
    if width != cols:
        raise ValueError(f"activations have {width} columns where the weight has {cols} inputs")
    stride, step = x.stride()
    if step != 1 and x.numel() > n:  # one column, or nothing, lies side by side whatever its stride says
        raise ValueError("the columns of the activations must lie side by side in memory")
    return n, stride


def _bias(bias: Tensor | None, rows: int) -> int:
    """Its address, 0 without one."""
    if bias is None:
        return 0
    if bias.dtype != torch.float32 or bias.shape != (rows,) or not (bias.is_cpu and bias.is_contiguous()):
        raise ValueError(f"the bias must be contiguous float32 [{rows}] on the host, not {_kind_of(bias)}")
    return bias.data_ptr()


def _kind_of(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
