"""Whether a checkpoint's tensors are those that its config promises, by name and shape, before any memory is taken.

A config that promises ten thousand layers costs nothing to write; the headers of the weights say what is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from hotplug.core.errors import WeightsError
from hotplug.core.weights.config import ModelConfig
from hotplug.core.weights.dummy import parameter_shapes
from hotplug.core.weights.metadata import brief

Shapes = Mapping[str, tuple[int, ...]]

_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")
_EXPERT = re.compile(r"\.mlp\.experts\.(\d{1,6})\.")
_STACKED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
"""Ends of the names of all experts' matrices in one (transformers 5)."""


def check_promised(
    stored: Shapes, config: ModelConfig, where: str, names: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raise WeightsError where tensors are missing or of other shapes. `stored` has Hugging Face names.

    Tensors that have no place in the model are not looked at. `names` are those of the file, where they are others.
    """
    if faults := _counts(stored, config):
        raise WeightsError("the checkpoint does not match its config", where=where, why=faults)
    expected = parameter_shapes(config)
    stacked = {name for name in stored if name.endswith(_STACKED)}
    missing = [name for name in expected if name not in stored and not (stacked and _EXPERT.search(name))]
    if missing:
        raise WeightsError("the checkpoint does not match its config", where=where, why=f"missing: {some(missing)}")
    expected |= {name: _stacked_shape(name, config) for name in stacked}
    for name, shape in stored.items():
        if expected.get(name, shape) != shape:
            raise WeightsError(
                f"the shape of {names.get(name, name)} is {list(shape)}, the config makes it {list(expected[name])}",
                where=where,
            )


def some(names: list[str]) -> str:
    """The first of many names, and how many there are beyond them."""
    first = ", ".join(map(brief, names[:4]))
    return first if len(names) <= 4 else f"{first} and {len(names) - 4} more"


def _counts(stored: Shapes, config: ModelConfig) -> list[str]:
    """Layers and experts that are not there. Checked first: the names of all that is promised may not fit memory."""
    layers = 1 + max((int(match[1]) for match in map(_LAYER.match, stored) if match), default=-1)
    if layers < config.num_layers:
        return [f"it promises {config.num_layers:,} layers, the files hold {layers:,}"]
    if not config.sparse_layers:
        return []
    experts = 1 + max((int(match[1]) for match in map(_EXPERT.search, stored) if match), default=-1)
    experts = max(experts, max((shape[0] for name, shape in stored.items() if name.endswith(_STACKED) and shape),
                               default=0))  # fmt: skip
    if experts < config.num_experts:
        return [f"it promises {config.num_experts:,} experts, the files hold {experts:,}"]
    return []


def _stacked_shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    width, hidden = config.moe_intermediate_size, config.hidden_size
    inner = (2 * width, hidden) if name.endswith(_STACKED[0]) else (hidden, width)
    return (config.num_experts, *inner)
