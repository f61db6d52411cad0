"""Rotary embedding in config.json, as transformers 5.23 reads it.

It writes `rope_parameters`; transformers 4 wrote `rope_theta` beside `rope_scaling`. Where both are there,
`rope_scaling` is taken and `rope_parameters` is not: model cards tell people to add it.
"""

from __future__ import annotations

import math

from hotplug.core.errors import UnsupportedModelError
from hotplug.core.weights.config import RopeConfig
from hotplug.core.weights.limits import FACTOR, MOST_POSITIONS, SCALE, THETA
from hotplug.core.weights.metadata import Metadata, shown

_KINDS = ("default", "linear", "llama3", "yarn")


def read_rope(config: Metadata, positions: int) -> tuple[RopeConfig, int]:
    """The rotary embedding, and how many positions it reaches; `positions` is max_position_embeddings.

    Raises ModelError and UnsupportedModelError.
    """
    scaling = config.section("rope_scaling")
    parameters = config.section("rope_parameters")
    rope = scaling if any(scaling.keys()) else parameters
    if nested := next((key for key in rope.keys() if rope.is_section(key)), None):  # noqa: SIM118  (no mapping)
        raise UnsupportedModelError(f"rope parameters by layer type ({shown(nested)}) are not built", where=rope.where)
    theta = rope.number("rope_theta", *THETA, None) or config.number("rope_theta", *THETA, 10000.0)
    for source in (rope, config):
        partial = source.number("partial_rotary_factor", 0.0, 1.0, 1.0)
        if partial != 1.0:
            raise UnsupportedModelError(f"a partial rotary factor of {partial} is not built", where=source.where)
    kind = rope.text("rope_type" if rope.has("rope_type") else "type", "default", most=100)
    if kind not in _KINDS:
        raise UnsupportedModelError(f"rope scaling {kind!r} is not built", where=rope.where,
                                    hint=f"Built: {', '.join(_KINDS)}.")  # fmt: skip
    if kind == "default":
        return RopeConfig(theta=theta), positions
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=rope.number("factor", *FACTOR)), positions
    where = config if config.has("original_max_position_embeddings") else rope
    original = where.integer("original_max_position_embeddings", 1, MOST_POSITIONS, positions)
    if kind == "llama3":
        return _llama3(rope, theta, original), positions
    yarn = _yarn(rope, theta, original, positions)
    stretched = int(original * yarn.factor)
    if stretched > MOST_POSITIONS:
        rope.refuse("factor", f"stretches the context to {stretched:,} positions", yarn.factor)
    return yarn, max(positions, stretched)


def _llama3(rope: Metadata, theta: float, original: int) -> RopeConfig:
    low, high = rope.number("low_freq_factor", *SCALE), rope.number("high_freq_factor", *SCALE)
    if low >= high:
        rope.refuse("high_freq_factor", f"must be above low_freq_factor {low:g}", high)
    return RopeConfig(
        theta=theta, kind="llama3", factor=rope.number("factor", *FACTOR), original_max_position=original,
        low_freq_factor=low, high_freq_factor=high,
    )  # fmt: skip


def _yarn(rope: Metadata, theta: float, original: int, positions: int) -> RopeConfig:
    if not rope.flag("truncate", True):
        raise UnsupportedModelError("yarn with truncate=false is not built", where=rope.where)
    if theta == 1.0:
        rope.refuse("rope_theta", "must be above 1 with yarn", theta)
    factor = rope.number("factor", *FACTOR, positions / original)
    return RopeConfig(
        theta=theta, kind="yarn", factor=factor, original_max_position=original,
        beta_fast=rope.number("beta_fast", 0.0, SCALE[1], 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 0.0, SCALE[1], 1.0) or 1.0,
        attention_factor=_attention_factor(rope, factor),
    )  # fmt: skip


def _attention_factor(rope: Metadata, factor: float) -> float:
    """YaRN's scale on queries and keys (section 3.4 of the paper), with DeepSeek's two-part form."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if rope.has("attention_factor"):
        return float(rope.number("attention_factor", *SCALE))
    first, second = (rope.number(key, 0.0, SCALE[1], 0.0) for key in ("mscale", "mscale_all_dim"))
    return scale(first) / scale(second) if first and second else scale(1.0)
