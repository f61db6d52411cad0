"""The rotary table: cosines and sines of every position, with the scalings that long-context models use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hotplug.core.weights.config import RopeConfig

_POSITIONS = 1 << 16
"""Positions computed at once, so that a long context takes no memory beside its table."""


def rotary_table(rope: RopeConfig, head_dim: int, max_position: int, device: torch.device) -> Tensor:
    """Float32 [max_position, head_dim]: cosines of the head_dim/2 frequencies, then their sines."""
    table = torch.empty(max_position, head_dim, dtype=torch.float32, device=device)
    if table.is_meta:
        return table
    inv_freq, magnitude = _inverse_frequencies(rope, head_dim), _magnitude(rope)
    for start in range(0, max_position, _POSITIONS):
        positions = torch.arange(start, min(start + _POSITIONS, max_position), dtype=torch.int64).to(torch.float32)
        angles = torch.outer(positions, inv_freq)
        table[start : start + _POSITIONS] = torch.cat((angles.cos(), angles.sin()), dim=-1) * magnitude
    return table


def _inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Float32 [head_dim / 2] radians a position."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    inv_freq = 1.0 / rope.theta**exponents
    if rope.freq_factors is not None:
        inv_freq = inv_freq / torch.tensor(rope.freq_factors, dtype=torch.float32)
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, inv_freq)
    if rope.kind == "yarn":
        return _yarn(rope, inv_freq, head_dim)
    return inv_freq


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    turns = rope.original_max_position * inv_freq / (2 * math.pi)  # rotations over the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * inv_freq / rope.factor + blend * inv_freq


def _yarn(rope: RopeConfig, inv_freq: Tensor, head_dim: int) -> Tensor:
    """YaRN (Peng et al., 2023), section 3.2: interpolate dimensions that turn rarely, keep those that turn often."""

    def dimension(rotations: float) -> float:
        """The frequency index that makes `rotations` turns over the original context."""
        context = rope.original_max_position
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float32)
    interpolate = ((index - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return interpolate * inv_freq / rope.factor + (1 - interpolate) * inv_freq


def _magnitude(rope: RopeConfig) -> float:
    """YaRN's attention temperature, folded into the table."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
