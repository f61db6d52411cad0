"""Triton's interpreter, where torch sees no GPU: turned on for the whole session before kernels are imported.

The interpreter of Triton 3.6 keeps bfloat16 as its bits and computes with them as if they were integers, rounds
to it by cutting off, and cannot loop to a loaded number under NumPy 2.4. The three are repaired here, so that a
kernel is tested as the compiler would have it: bfloat16 is widened, computed with, and rounded to nearest even.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import numpy as np


def use_where_no_gpu() -> None:
    """Set TRITON_INTERPRET, which is read when a kernel is decorated; nothing on a machine with a GPU."""
    import torch

    if torch.cuda.is_available() or find_spec("triton") is None:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    _loop_to_a_tensor()
    _compute_with_bfloat16()


def widen(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 `bits` (uint16)."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """The bits of float32 `values` as bfloat16, rounded to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).reshape(values.shape)


def _loop_to_a_tensor() -> None:
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _compute_with_bfloat16() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def is_narrow(handle: Any) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def as_float32(handle: Any) -> Any:
        return TensorHandle(widen(handle.data), tl.float32) if is_narrow(handle) else handle

    def as_bfloat16(handle: Any) -> Any:
        return TensorHandle(narrow(handle.data), tl.bfloat16)

    def computed(method: Any) -> Any:
        """`method` of one or two operands and an operation, in float32 where the first operand is bfloat16."""

        def wrapped(self: Any, first: Any, *rest: Any) -> Any:
            if not is_narrow(first):
                return method(self, first, *rest)
            *others, operation = rest
            found = method(self, as_float32(first), *(as_float32(h) for h in others), operation)
            return found if found.data.dtype == np.bool_ else as_bfloat16(found)

        return wrapped

    def converted(method: Any) -> Any:
        def wrapped(self: Any, src: Any, dst_type: Any, *rest: Any) -> Any:
            if dst_type.scalar == tl.bfloat16:
                return src if is_narrow(src) else as_bfloat16(src)
            if is_narrow(src):
                return self.cast_impl(as_float32(src), dst_type)
            return method(self, src, dst_type, *rest)

        return wrapped

    def dot(method: Any) -> Any:
        return lambda self, a, b, *rest: method(self, as_float32(a), as_float32(b), *rest)

    repairs = {"unary_op": computed, "binary_op": computed, "cast_impl": converted, "create_fp_to_fp": converted,
               "create_dot": dot}  # fmt: skip
    for name, repair in repairs.items():
        setattr(InterpreterBuilder, name, repair(getattr(InterpreterBuilder, name)))
