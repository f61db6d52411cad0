"""Recipes hold what a program does, or refuse it by name; files hold recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hotplug.platforms.cpu.openvino.recipe import Call, Recipe, Value, recipe_of
from hotplug.platforms.cpu.openvino.store import load, save
from hotplug.vendor import PlatformError

KNOWN = frozenset({"aten::add.Tensor", "aten::mul.Tensor"})


class Program(nn.Module):
    """`make` of a tensor of varying length, as hidden states and as scores."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self._make = make

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = self._make(x)
        return made, made + made


def recipe(make: Any) -> Recipe:
    dims = {"x": {0: torch.export.Dim("tokens")}}
    return recipe_of(torch.export.export(Program(make), (torch.zeros(5, 6),), dynamic_shapes=dims), KNOWN)


def test_calls_stand_in_order_with_sizes_that_vary_left_open() -> None:
    found = recipe(lambda x: x.view(x.shape[0], 2, 3).to(torch.float32) * 2.0)
    assert [(call.op, call.args) for call in found.calls] == [
        ("reshape", [Value(0), [0, 2, 3]]),
        ("aten::mul.Tensor", [Value(found.calls[0].result), 2.0]),
        ("aten::add.Tensor", [Value(found.hidden), Value(found.hidden)]),
    ]
    assert found.logits == found.calls[-1].result


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: torch.cumsum(x, 1), "no translation of aten::cumsum"),
        (lambda x: torch.add(x, x, alpha=2), "no translation of aten::add.Tensor"),  # whose alpha would be lost
        (lambda x: x.to(torch.float64), "no translation of aten::to.dtype"),
    ],
)
def test_what_has_no_translation_is_refused_by_name(make: Any, words: str) -> None:

    with pytest.raises(PlatformError, match=words):
        recipe(make)


def test_a_file_gives_the_recipe_that_was_saved(tmp_path: Path) -> None:
    made = Recipe([0, 1], {2: "model.norm.weight"}, [
        Call("hotplug::rms_norm", "norm", [Value(0), Value(2), 1e-5], 3),
        Call("aten::split_with_sizes", "split", [Value(3), [1, 2], -1], 4),
        Call("hotplug::attention", "attn", [Value(4), None, "HND"], 5),
    ], 4, 5)  # fmt: skip
    save(made, tmp_path / "step.recipe")
    assert load(tmp_path / "step.recipe") == made
    assert [path.name for path in tmp_path.iterdir()] == ["step.recipe"]
