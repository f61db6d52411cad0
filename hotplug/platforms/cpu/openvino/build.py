"""From a recipe to an OpenVINO model: one translation an operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as op
from torch import Tensor

from hotplug.platforms.cpu.openvino.graph import Graph, Weight
from hotplug.platforms.cpu.openvino.operations import TRANSLATIONS
from hotplug.platforms.cpu.openvino.recipe import Recipe, Value


def build(
    recipe: Recipe, weights: Mapping[str, Tensor], inputs: Mapping[str, int]
) -> tuple[ov.Model, list[np.ndarray]]:
    """The model of a recipe, and arrays whose memory it reads.

    `inputs` are the program's before the caches, in order: names, and numbers of dimensions.
    Its parameters are those of them that are read, and `cache_0` and on; its results are `hidden` and `logits`.
    """
    graph = Graph()
    values: dict[int, Any] = {}
    wanted = _numbers(recipe)
    for (name, dims), number in zip(inputs.items(), recipe.inputs[: len(inputs)], strict=True):
        if number in wanted:
            values[number] = graph.parameter(name, (-1,) * dims, ov.Type.i64)
    for i, number in enumerate(recipe.inputs[len(inputs) :]):
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
