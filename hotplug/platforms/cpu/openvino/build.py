"""From a recipe to an OpenVINO model: one translation an operation, weights as constants over torch's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
from openvino import opset15 as op
from torch import Tensor

from hotplug.platforms.cpu.openvino.recipe import NUM_INPUTS, Recipe, Value

if TYPE_CHECKING:
    from openvino import Output

INPUTS = ("token_ids", "positions", "slots", "block_table", "query_start", "seq_lens", "scores", "kept")


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


def build(recipe: Recipe, weights: Mapping[str, Tensor]) -> tuple[ov.Model, list[np.ndarray]]:
    """The model of a recipe, and arrays whose memory it reads.

    Its parameters are those of `INPUTS` that are read, and `cache_0` and on; its results are `hidden` and `logits`.
    """
    from hotplug.platforms.cpu.openvino.operations import TRANSLATIONS

    graph = Graph()
    values: dict[int, Any] = {}
    wanted = _numbers(recipe)
    for name, number in zip(INPUTS, recipe.inputs[:NUM_INPUTS], strict=True):
        if number in wanted:
            values[number] = graph.parameter(name, (-1, -1) if name == "block_table" else (-1,), ov.Type.i64)
    for i, number in enumerate(recipe.inputs[NUM_INPUTS:]):
        # Of no type: the plugin sets the cache's own. It would work on a converted copy of a narrower one declared.
        values[number] = graph.parameter(f"cache_{i}", (-1, -1, -1, -1), ov.Type.dynamic)
    for number, name in recipe.weights.items():
        values[number] = Weight(name, weights[name], graph)
    for call in recipe.calls:
        args = [_given(arg, values) for arg in call.args]
        values[call.result] = TRANSLATIONS[call.op](graph, call.site, *args)
    results = [op.result(values[number]) for number in (recipe.hidden, recipe.logits)]
    for result, name in zip(results, ("hidden", "logits"), strict=True):
        result.output(0).set_names({name})
    model = ov.Model(results, list(graph.parameters.values()), "step")
    return model, graph.kept_alive


def _given(arg: Any, values: Mapping[int, Any]) -> Any:
    if isinstance(arg, Value):
        return values[arg.number]
    if isinstance(arg, list):
        return [_given(each, values) for each in arg]
    return arg


def _numbers(recipe: Recipe) -> set[int]:
    """The values that calls need; slots are read by cache writes, which OpenVINO's attention does by itself."""
    found: set[int] = set()

    def visit(arg: Any) -> None:
        if isinstance(arg, Value):
            found.add(arg.number)
        elif isinstance(arg, list):
            for each in arg:
                visit(each)

    for call in recipe.calls:
        visit(list(call.args))
    return found
