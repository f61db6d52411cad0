"""Recipes on disk: one JSON file, with a checksum, so that what is damaged or of another form is found out."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from hotplug.platforms.cpu.openvino.recipe import Call, Recipe, Value

FORMAT = 2
"""Raised when recipes, or what they are written as, change."""


def save(recipe: Recipe, path: Path) -> None:
    """Write a recipe so that another process sees all of it or nothing."""
    body = json.dumps({
        "inputs": recipe.inputs,
        "weights": recipe.weights,
        "calls": [[call.op, call.site, _written(call.args), call.result] for call in recipe.calls],
        "hidden": recipe.hidden,
        "logits": recipe.logits,
    })  # fmt: skip
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(f"hotplug recipe {FORMAT} {_digest(body)}\n{body}\n")
    part.replace(path)


def load(path: Path) -> Recipe:
    """The recipe of a file. Raises ValueError with what is wrong with it, OSError where it cannot be read."""
    try:
        head, _, body = path.read_text().rstrip("\n").partition("\n")
    except UnicodeDecodeError as e:
        raise ValueError("it is no text") from e
    if head != f"hotplug recipe {FORMAT} {_digest(body)}":
        known = head.startswith(f"hotplug recipe {FORMAT} ")
        raise ValueError("its checksum is another" if known else "it is no recipe of this version")
    found = json.loads(body)
    calls = [Call(op, site, _read(args), result) for op, site, args, result in found["calls"]]
    weights = {int(number): name for number, name in found["weights"].items()}
    return Recipe(found["inputs"], weights, calls, found["hidden"], found["logits"])


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _written(arg: Any) -> Any:
    if isinstance(arg, Value):
        return {"value": arg.number}
    return [_written(each) for each in arg] if isinstance(arg, list | tuple) else arg


def _read(arg: Any) -> Any:
    if isinstance(arg, dict):
        return Value(arg["value"])
    return [_read(each) for each in arg] if isinstance(arg, list) else arg
