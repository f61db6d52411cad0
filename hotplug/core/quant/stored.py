"""Matrices as a checkpoint stores them: groups of 32 weights along a row, each with a scale.

The formats are GGUF's (ggml-common.h: `block_q4_0`, `block_q4_1`, `block_q8_0`): a group is its float16 scale, in
Q4_1 its float16 minimum too, then its weights. Four-bit weights lie two to a byte: low halves are the first sixteen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hotplug.core.errors import ConfigError
from hotplug.core.ops.registry import Op
from hotplug.core.ops.stored import GROUP, GROUP_BYTES, LINEAR
from hotplug.core.quant.scheme import QuantizedRows
from hotplug.core.weights.stored import StoredMatrix

STORED = "stored"
"""What `--quantization` calls keeping the checkpoint's groups."""


@dataclass(frozen=True)
class StoredScheme:
    """Keeps groups of one format. Implements `QuantScheme`; floating-point weights are rounded to it."""

    name: str

    @property
    def op(self) -> Op:
        return LINEAR

    def tensors(self, out_features: int, in_features: int) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"data": ((out_features, in_features // GROUP * GROUP_BYTES[self.name]), torch.uint8)}

    def quantize(self, weight: Tensor) -> Sequence[Tensor]:
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType[self.name.upper()]
        rows = quants.quantize(np.ascontiguousarray(weight.to("cpu", torch.float32).numpy()), kind)
        return [torch.from_numpy(rows).to(weight.device)]

    def parameter(self, rows: int, columns: int, device: torch.device) -> nn.Parameter:
        """Uninitialized groups of a matrix."""
        ((shape, dtype),) = self.tensors(rows, columns).values()
        return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class StoredRows(QuantizedRows):
    """A place for groups of one format, which takes them as they are. `rows` is a parameter, or some rows of one."""

    def __init__(self, scheme: StoredScheme, rows: Sequence[Tensor], columns: int) -> None:
        super().__init__(scheme, rows, columns, torch.float32)
        self.scheme, self._data = scheme.name, rows[0]

    def take(self, matrix: StoredMatrix) -> None:
        """Take `matrix`, of the same shape and format: the tensor itself where it is a whole parameter's, else a copy.

        So a parameter may be a view of the mapped file, which costs no memory of its own and must not be written to.
        """
        assert matrix.scheme == self.scheme
        if isinstance(self._data, nn.Parameter) and self._data.device == matrix.data.device:
            self._data.data = matrix.data
        else:
            self._data.copy_(matrix.data)


def stored_schemes(formats: Mapping[str, str]) -> tuple[StoredScheme, StoredScheme | None]:
    """How a checkpoint stores the matrices of its layers, and embedding and head (None: in floating point).

    `formats` holds the format of each matrix by its Hugging Face name. Raises ConfigError where layers have several
    formats or one that is not known, or where embedding and head differ.
    """
    layers = {kind for name, kind in formats.items() if name.startswith("model.layers.")}
    tables = {kind for name, kind in formats.items() if not name.startswith("model.layers.")}
    if len(layers) != 1 or not layers <= GROUP_BYTES.keys() or len(tables) > 1:
        raise ConfigError(
            f"the checkpoint does not store its matrices in one of {', '.join(GROUP_BYTES)}",
            where="--quantization stored",
            why=f"it has {', '.join(sorted(layers | tables)) or 'floating point'}",
            hint="Leave --quantization out, then it is served in floating point.",
        )
    (layer,), table = layers, tables.pop() if tables else None
    return StoredScheme(layer), StoredScheme(table) if table in GROUP_BYTES else None
