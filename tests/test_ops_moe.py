"""References of routing and experts against a token-by-token formulation in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.moe import moe_experts, moe_route
from hotplug.core.ops.registry import Bucket

FEW = settings(max_examples=150, deadline=None, derandomize=True)
SHAPES = {
    "tokens": st.integers(0, 6),
    "hidden": st.integers(1, 9),
    "count": st.integers(1, 9),
    "seed": st.integers(0, 99),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@FEW
@given(**SHAPES, data=st.data(), renormalize=st.booleans())
def test_a_token_goes_to_the_experts_of_highest_softmax(
    tokens: int, hidden: int, count: int, seed: int, data: st.DataObject, renormalize: bool
) -> None:
    top_k = data.draw(st.integers(1, count))
    x, weight = normal(tokens, hidden, seed=seed), normal(count, hidden, seed=seed + 1)
    weights, experts = moe_route(x, weight, top_k, renormalize)
    assert (weights.dtype, experts.dtype) == (torch.float32, torch.int32)
    assert weights.shape == experts.shape == (tokens, top_k)
    scores = x.double().numpy() @ weight.double().numpy().T
    odds = np.exp(scores - scores.max(-1, keepdims=True, initial=-np.inf))
    odds /= odds.sum(-1, keepdims=True)
    for token in range(tokens):
        best = sorted(range(count), key=lambda expert: -odds[token, expert])[:top_k]
        assert experts[token].tolist() == best
        share = odds[token, best] / (odds[token, best].sum() if renormalize else 1.0)
        assert_close(weights[token].double(), torch.from_numpy(share), rtol=1e-5, atol=1e-6)


def test_of_equal_scores_the_lower_expert_comes_first() -> None:
    weight = torch.tensor([[1.0], [2.0], [2.0], [0.0], [2.0], [1.0]])
    weights, experts = moe_route(torch.ones(3, 1), weight, 5, renormalize=False)
    assert experts.tolist() == [[1, 2, 4, 0, 5]] * 3
    assert (weights[:, :3] == weights[:, :1]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_experts_of_a_token_that_is_not_finite_exist_and_differ(value: float) -> None:
    x = torch.full((1, 4), value)
    _, experts = moe_route(x, normal(7, 4), 5, renormalize=True)
    assert len(set(experts[0].tolist())) == 5 and int(experts.min()) >= 0 and int(experts.max()) < 7


def test_scores_are_rounded_to_the_dtype_of_the_model_and_softmax_is_not() -> None:
    x, weight = normal(5, 16).bfloat16(), normal(6, 16, seed=1).bfloat16()
    weights, _ = moe_route(x, weight, 6, renormalize=False)
    scores = (x.double() @ weight.double().T).bfloat16().double()
    assert_close(weights.double(), scores.softmax(-1).sort(descending=True).values, rtol=1e-5, atol=1e-6)


@FEW
@given(**SHAPES, width=st.integers(1, 7), data=st.data())
def test_experts_are_gated_layers_summed_by_weight(
    tokens: int, hidden: int, count: int, seed: int, width: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, count))
    x = normal(tokens, hidden, seed=seed)
    weights, experts = torch.rand((tokens, count)).topk(top_k)
    gate_up, down = normal(count, 2 * width, hidden, seed=seed + 1), normal(count, hidden, width, seed=seed + 2)
    actual = moe_experts(x, weights, experts.to(torch.int32), gate_up, down)
    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token in range(tokens):
        for weight, expert in zip(weights[token].tolist(), experts[token].tolist(), strict=True):
            both = gate_up[expert].double() @ x[token].double()
            gate, up = both[:width], both[width:]
            expected[token] += weight * (down[expert].double() @ (gate / (1 + (-gate).exp()) * up))
    assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_sum_of_bfloat16_experts_is_in_float32() -> None:
    """256 + 1 and again + 1 is 256 in bfloat16, where steps are 2; the weights make the experts' outputs so."""
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    gate_up = torch.ones(3, 2, 1, dtype=torch.bfloat16)
    unit = float(torch.nn.functional.silu(torch.ones((), dtype=torch.bfloat16)))
    weights = torch.tensor([[256.0, 1.0, 1.0]]) / unit
    total = moe_experts(
        x, weights, torch.tensor([[0, 1, 2]], dtype=torch.int32), gate_up, torch.ones(3, 1, 1).bfloat16()
    )
    assert total.dtype == torch.bfloat16 and total.item() == 258.0


def test_an_overflow_of_one_token_stays_its_own() -> None:
    x = torch.tensor([[1.0], [1e30]])
    gate_up, down = torch.ones(2, 2, 1), torch.ones(2, 1, 1)
    gate_up[1] = 1e20
    out = moe_experts(x, torch.ones(2, 1), torch.tensor([[0], [1]], dtype=torch.int32), gate_up, down)
    assert out[0].isfinite().all() and not out[1].isfinite().any()


def test_kernels_may_choose_by_the_number_of_tokens() -> None:
    registry = builtin_registry()
    for name in ("moe_route", "moe_experts"):
        bucket = registry.op(name).bucket
        assert bucket is not None and bucket(torch.zeros(5, 3), None, None) == Bucket(5, 5)


@pytest.mark.parametrize("op", ["moe_route", "moe_experts"])
def test_references_read_nothing_on_the_host(op: str) -> None:
    """Traced with tensors that have no data, where a read would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, weights, experts = torch.empty(4, 8), torch.empty(4, 2), torch.empty(4, 2, dtype=torch.int32)
        if op == "moe_route":
            assert moe_route(x, torch.empty(6, 8), 2, True)[1].shape == (4, 2)
        else:
            assert moe_experts(x, weights, experts, torch.empty(6, 10, 8), torch.empty(6, 8, 5)).shape == (4, 8)
