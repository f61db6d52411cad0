"""References of embedding, matrix products, norms, activations and rotation against independent formulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hotplug.core.layers.rope import rotary_table
from hotplug.core.ops.dense import embed, linear, logits, silu_mul
from hotplug.core.ops.norm import add_rms_norm, rms_norm
from hotplug.core.ops.rope import qk_norm_rope, rope
from hotplug.core.weights.config import RopeConfig

TOKENS = pytest.mark.parametrize("tokens", [0, 1, 7])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wide(x: Tensor) -> np.ndarray:
    return x.double().numpy()


def close(actual: Tensor, expected: np.ndarray) -> None:
    assert_close(actual.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


@TOKENS
def test_embed_takes_rows(tokens: int) -> None:
    ids, weight = torch.arange(tokens) * 3 % 11, normal(11, 5)
    assert_close(embed(ids, weight), torch.stack([*(weight[i] for i in ids), torch.zeros(5)])[:tokens])


def test_embed_takes_int32_ids() -> None:
    weight = normal(4, 3)
    assert_close(embed(torch.tensor([2, 0], dtype=torch.int32), weight), weight[[2, 0]])


@TOKENS
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_a_matrix_product(tokens: int, bias: bool) -> None:
    x, weight, offset = normal(tokens, 13), normal(5, 13, seed=1), normal(5, seed=2)
    expected = wide(x) @ wide(weight).T + (wide(offset) if bias else 0.0)
    close(linear(x, weight, offset if bias else None), expected)


def test_logits_are_float32_whatever_the_weights_are() -> None:
    hidden, weight = normal(3, 8).bfloat16(), normal(6, 8, seed=1).bfloat16()
    scores = logits(hidden, weight, None)
    assert scores.dtype == torch.float32
    assert_close(scores.double(), torch.from_numpy(wide(hidden) @ wide(weight).T), rtol=1e-2, atol=5e-2)


@TOKENS
def test_silu_mul_gates_the_second_half(tokens: int) -> None:
    x = normal(tokens, 14)
    gate, up = wide(x)[:, :7], wide(x)[:, 7:]
    close(silu_mul(x), gate / (1 + np.exp(-gate)) * up)


def root_mean_square_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


@TOKENS
def test_rms_norm_divides_by_the_root_mean_square(tokens: int) -> None:
    x, weight = normal(tokens, 13) * 4, normal(13, seed=1)
    close(rms_norm(x, weight, 1e-3), root_mean_square_norm(wide(x), wide(weight), 1e-3))


def test_rms_norm_of_bfloat16_is_computed_in_float32() -> None:
    x, weight = (normal(4, 256) * 100).bfloat16(), torch.ones(256, dtype=torch.bfloat16)
    expected = root_mean_square_norm(wide(x), wide(weight), 1e-6)
    assert_close(rms_norm(x, weight, 1e-6).double(), torch.from_numpy(expected), rtol=2**-8, atol=1e-6)


@TOKENS
def test_add_rms_norm_returns_the_normalized_sum_and_the_sum(tokens: int) -> None:
    x, residual, weight = normal(tokens, 6), normal(tokens, 6, seed=1), normal(6, seed=2)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    close(total, wide(x) + wide(residual))
    close(normed, root_mean_square_norm(wide(x) + wide(residual), wide(weight), 1e-5))


def rotated(x: Tensor, positions: Tensor, theta: float, rotary_dim: int) -> np.ndarray:
    """Each pair (i, i + half) as a complex number, turned by position * theta ** (-2 i / rotary_dim)."""
    half = rotary_dim // 2
    values = wide(x)
    angle = positions.numpy()[:, None] * theta ** (-np.arange(half) * 2 / rotary_dim)
    turned = (values[..., :half] + 1j * values[..., half:rotary_dim]) * np.exp(1j * angle)[:, None]
    return np.concatenate([turned.real, turned.imag, values[..., rotary_dim:]], -1)


@TOKENS
@pytest.mark.parametrize("rotary_dim", [8, 6])
def test_rope_turns_pairs_of_dimensions(tokens: int, rotary_dim: int) -> None:
    q, k = normal(tokens, 3, 8), normal(tokens, 1, 8, seed=1)
    positions = torch.arange(tokens) * 5 + 2
    table = rotary_table(RopeConfig(theta=100.0), rotary_dim, 64, torch.device("cpu"))
    for actual, x in zip(rope(q, k, positions, table), (q, k), strict=True):
        close(actual, rotated(x, positions, 100.0, rotary_dim))


def test_qk_norm_rope_normalizes_heads_before_it_turns_them() -> None:
    q, k, qw, kw = normal(5, 4, 8), normal(5, 2, 8, seed=1), normal(8, seed=2), normal(8, seed=3)
    positions = torch.tensor([9, 0, 3, 3, 1])
    table = rotary_table(RopeConfig(), 8, 16, torch.device("cpu"))
    for actual, x, weight in zip(qk_norm_rope(q, k, qw, kw, 1e-5, positions, table), (q, k), (qw, kw), strict=True):
        normed = torch.from_numpy(root_mean_square_norm(wide(x), wide(weight), 1e-5))
        close(actual, rotated(normed, positions, 10000.0, 8))


SCALINGS = {
    "default": RopeConfig(theta=5e5),
    "linear": RopeConfig(kind="linear", factor=4.0),
    "llama3": RopeConfig(theta=5e5, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                         original_max_position=8192),
    "yarn": RopeConfig(theta=1e6, kind="yarn", factor=4.0, original_max_position=32768),
    "yarn-extreme": RopeConfig(theta=100.0, kind="yarn", factor=40.0, original_max_position=16),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_table_equals_transformers(name: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_config = SCALINGS[name]
    parameters = {"rope_type": rope_config.kind, "rope_theta": rope_config.theta, "factor": rope_config.factor,
                  "low_freq_factor": rope_config.low_freq_factor, "high_freq_factor": rope_config.high_freq_factor,
                  "original_max_position_embeddings": rope_config.original_max_position}  # fmt: skip
    kept = {"default": 2, "linear": 3}.get(name, 6)
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=131072,
        rope_parameters=dict(list(parameters.items())[:kept]) if kept < 6 else parameters,
    )  # fmt: skip
    if rope_config.kind == "default":
        inv_freq, magnitude = rope_config.theta ** (-torch.arange(0, 128, 2) / 128), 1.0
    else:
        inv_freq, magnitude = ROPE_INIT_FUNCTIONS[rope_config.kind](config, "cpu")
    angles = torch.arange(512).float()[:, None] * inv_freq
    expected = torch.cat([angles.cos(), angles.sin()], -1) * magnitude
    assert_close(rotary_table(rope_config, 128, 512, torch.device("cpu")), expected, rtol=1e-4, atol=2e-4)


def test_freq_factors_divide_each_frequency() -> None:
    table = rotary_table(RopeConfig(theta=16.0, freq_factors=(2.0, 8.0)), 4, 3, torch.device("cpu"))
    assert_close(table[2, 2:].double(), torch.tensor([math.sin(2 / 2), math.sin(2 / 4 / 8)]).double())
