"""An OpenVINO model while it is built: weights as constants over torch's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
from openvino import opset15 as op
from torch import Tensor

if TYPE_CHECKING:
    from openvino import Output


class Weight:
    """A weight that a call reads: the tensor, and its constant once something asks for it."""

    def __init__(self, name: str, tensor: Tensor, graph: Graph) -> None:
        self.name, self.tensor, self._graph = name, tensor, graph

    @property
    def output(self) -> Output:
        return self._graph.constant(self.tensor)


class Graph:
    """A model while it is built."""

    def __init__(self) -> None:
        self.parameters: dict[str, Any] = {}
        self._constants: dict[tuple[Any, ...], Output] = {}
        self._shared: dict[Any, Any] = {}
        self.kept_alive: list[Any] = []
        """Arrays whose memory constants are."""

    def parameter(self, name: str, shape: Sequence[int], kind: Any) -> Output:
        made = op.parameter(ov.PartialShape(list(shape)), kind, name=name)
        made.output(0).set_names({name})
        self.parameters[name] = made
        return made.output(0)

    def constant(self, tensor: Tensor) -> Output:
        """A constant that is the memory of a tensor, one for each memory."""
        tensor = tensor.detach()
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in self._constants:
            self._constants[key] = self.array(tensor.contiguous().numpy())
        return self._constants[key]

    def array(self, array: np.ndarray, kind: Any = None) -> Output:
        """A constant that is the memory of an array. `kind` reads it as another type, two to a byte for u4."""
        self.kept_alive.append(array)
        if kind is None:
            return op.constant(array, shared_memory=True).output(0)
        shape = list(array.shape)
        if kind is ov.Type.u4:
            shape[-1] *= 2
        return ov.op.Constant(ov.Tensor(array, ov.Shape(shape), kind), shared_memory=True).output(0)

    def scalar(self, value: float, kind: Any) -> Output:
        return op.constant(value, kind).output(0)

    def ints(self, *values: int) -> Output:
        return op.constant(np.array(values, np.int64)).output(0)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` answers, made the first time: what all layers share."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]
