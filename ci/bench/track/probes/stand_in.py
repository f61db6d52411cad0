"""A family without a model: a probe's value is computed from a recipe, so that the tool itself can be tested.

The recipe is the tree's file `stand_in.json`: {probe: [value, value, ..]}, given one after another, over and over.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path


class StandIn:
    plan_hash = "stand-in"

    def __init__(self) -> None:
        recipe = json.loads(Path("stand_in.json").read_text())
        self._values = {name: itertools.cycle(values) for name, values in recipe.items()}

    def measure(self, probe: str) -> dict[str, float]:
        return {probe: next(self._values[probe])}


def start(options: dict[str, object]) -> StandIn:
    return StandIn()
