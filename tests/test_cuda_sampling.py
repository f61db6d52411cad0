"""The CUDA platform's sampling and input kernels against their references: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hotplug.core.ops import dense, sampling
from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.request import NO_TOKEN
from hotplug.platforms.cuda.kernels import KERNELS
from hotplug.platforms.cuda.kernels.inputs import embed, prepare_step
from hotplug.platforms.cuda.kernels.sample import _tokens, sample, sample_rows
from hotplug.platforms.cuda.kernels.scores import logprobs, penalties
from hotplug.plugins.conformance.cases import Builder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = 256
"""Logits of a chunk in most tests, so that a small vocabulary has several and its candidates overflow a list."""


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(rows: int, vocab: int, spread: float, names: str, seed: int = 0) -> tuple[Tensor | None, ...]:
    """Arguments of `sample`: filters named by letters, k (few tokens), K (many), p and m."""
    random = rng(seed)
    logits = torch.randn((rows, vocab), generator=random) * spread
    some = torch.rand((4, rows), generator=random)
    top_k = (some[1] * (vocab - 200) + 200 if "K" in names else some[1] * 60).to(torch.int64)
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=random)
    counters = torch.randint(0, 1000, (rows,), generator=random)
    return (
        logits, some[0] * 1.5 + 0.2, top_k if set("kK") & set(names) else None,
        some[2].clamp(0.05) * 0.99 if "p" in names else None, some[3] * 0.2 if "m" in names else None, seeds, counters,
    )  # fmt: skip


def on_device(args: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if a is None else a.to(DEVICE) for a in args]


def drawn(args: tuple[Tensor | None, ...], chunk: int = SMALL) -> Tensor:
    logits, *rest = on_device(args)
    return _tokens(logits, None, *rest, chunk=chunk).cpu()


@pytest.mark.parametrize(("vocab", "spread", "names"), [
    (100, 3.0, ""), (600, 0.5, ""), (600, 4.0, "m"), (600, 0.5, "m"), (600, 3.0, "k"), (600, 3.0, "p"),
    (600, 0.3, "p"), (700, 0.4, "K"), (600, 3.0, "kpm"), (600, 0.3, "Kp"),
])  # fmt: skip
def test_draws_are_those_of_the_reference(vocab: int, spread: float, names: str) -> None:
    args = draws(4, vocab, spread, names)
    assert drawn(args).tolist() == sampling.sample(*args).tolist()


def test_many_draws_are_those_of_the_reference() -> None:
    """Rounding may decide one."""
    logits = torch.randn(200, generator=rng(1)) * 2
    count = 120
    args = (logits.expand(count, -1), torch.full((count,), 0.9), None, None, torch.full((count,), 0.01),
            torch.full((count,), -5), torch.arange(count))  # fmt: skip
    same = drawn(args, 4096) == sampling.sample(*args)
    assert (~same).sum() <= 1


@pytest.mark.parametrize("names", ["k", "p", "m", "kpm", "Kp"])
def test_what_filters_leave_out_is_never_drawn(names: str) -> None:
    logits, warm, top_k, top_p, min_p, *_ = draws(1, 300, 2.0, names, seed=3)
    assert logits is not None and warm is not None
    scaled = (logits - logits.max()) / warm
    least = sampling._threshold(scaled, top_k, top_p) if top_k is not None or top_p is not None else -torch.inf
    probs = scaled.masked_fill(scaled < least, -torch.inf).softmax(-1)
    kept = (probs > 0) & (probs >= (0.0 if min_p is None else min_p) * probs.max())
    count = 8
    many = [None if a is None else a.expand(count, *a.shape[1:]) for a in (logits, warm, top_k, top_p, min_p)]
    tokens = drawn((*many, torch.arange(count), torch.arange(count)))
    assert kept[0, tokens].all()


def test_ties_with_the_last_kept_are_kept_and_may_be_many() -> None:
    """More equal logits than a list holds, and the filters' limit among them."""
    logits = torch.zeros(1, 600)
    logits[0, 77] = 1.0
    count = 4
    index = torch.arange(count)
    for top_k, top_p in ((torch.full((count,), 5), None), (None, torch.full((count,), 0.5))):
        args = (logits.expand(count, -1), torch.ones(count), top_k, top_p, None, index, index)
        tokens = drawn(args).tolist()
        assert tokens == sampling.sample(*args).tolist()
        assert len(set(tokens)) == count


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((4, 500), float("-inf"))
    logits[:, [3, 300, 301, 499]] = 0.0
    index = torch.arange(4)
    for top_k, top_p in ((None, None), (torch.full((4,), 10), None), (None, torch.full((4,), 0.9))):
        args = (logits, torch.ones(4), top_k, top_p, None, index, index)
        tokens = drawn(args).tolist()
        assert set(tokens) <= {3, 300, 301, 499}
        assert tokens == sampling.sample(*args).tolist()


@pytest.mark.parametrize("temperature", [1e-40, 1e-30, 1e-3])
def test_a_temperature_near_zero_draws_the_best_token(temperature: float) -> None:
    logits, *_, seeds, counters = draws(3, 300, 50.0, "")
    args = (logits, torch.full((3,), temperature), torch.full((3,), 9), torch.full((3,), 0.9), None, seeds, counters)
    assert logits is not None and drawn(args).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
@pytest.mark.parametrize("vocab", [2, 257, 5000])
def test_rows_take_the_tokens_of_the_reference(vocab: int, index_dtype: str) -> None:
    lens = [(1, 9)] * 7
    call = Builder("float32", index_dtype, vocab).call("sample_rows", {"vocab": vocab}, lens)
    assert call is not None
    expected = sampling.sample_rows(*call.args)
    actual = sample_rows(*on_device(call.args))
    assert actual.dtype == torch.int64
    assert actual.tolist() == expected.tolist()


def test_the_first_of_equal_best_tokens_is_greedy() -> None:
    logits = torch.zeros(3, 5000)
    logits[0, [4100, 4500]], logits[1, [17, 18, 4999]], logits[2] = 1.0, 1.0, float("-inf")
    one = torch.zeros(1, device=DEVICE)
    whole = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    rows = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    tokens = sample_rows(logits.to(DEVICE), rows, one, whole, one, one, whole, whole.expand(3).contiguous())
    assert tokens.tolist() == [4100, 17, NO_TOKEN]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_finite_best_score_give_no_token(value: float) -> None:
    args = draws(2, 300, 1.0, "kp")
    one, every = torch.randn(2, 300), torch.full((2, 300), value)
    one[:, 299] = value
    for warm in (torch.zeros(2), torch.ones(2)):
        assert drawn((every, warm, *args[2:])).tolist() == [NO_TOKEN, NO_TOKEN]
        assert (drawn((one, warm, *args[2:])) == NO_TOKEN).all() == (value > 0 or math.isnan(value))


def test_no_rows_give_no_tokens() -> None:
    assert sample(*on_device(draws(0, 50, 1.0, "kpm"))).tolist() == []


def test_penalties_and_logprobs_are_those_of_the_reference() -> None:
    for vocab in (257, 5000):
        builder = Builder("float32", "int32", vocab)
        call = builder.call("penalties", {"vocab": vocab}, [(1, 1)] * 3)
        assert call is not None
        assert_close(penalties(*on_device(call.args)).cpu(), sampling.penalties(*call.args))
        logits, tokens = torch.randn((4, vocab), generator=rng(vocab)) * 4, torch.tensor([0, 5, vocab - 1, 7])
        for num_top in (0, 5):
            actual = logprobs(logits.to(DEVICE), tokens.to(DEVICE), num_top)
            for got, want in zip(actual, sampling.logprobs(logits, tokens, num_top), strict=True):
                assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_rows_are_copied(dtype: torch.dtype) -> None:
    weight = torch.randn((50, 2100), generator=rng(0)).to(dtype)
    ids = torch.tensor([49, 0, 3, 3], dtype=torch.int32)
    assert_close(embed(ids.to(DEVICE), weight.to(DEVICE)).cpu(), dense.embed(ids, weight), rtol=0, atol=0)


def prepared(token_ids, rows, query_start, start, last_tokens, block_tables, block_size, num_blocks):
    """The semantics of `prepare_step`, a token at a time."""
    tokens, positions, slots = [], [], []
    for i, row in enumerate(rows.tolist()):
        for token in range(int(query_start[i]), int(query_start[i + 1])):
            position = int(start[i]) + token - int(query_start[i])
            given = int(token_ids[token])
            tokens.append(int(last_tokens[row]) if given < 0 else given)
            positions.append(position)
            slots.append(int(block_tables[row, position // block_size]) * block_size + position % block_size)
    seq_lens = [int(s) + int(b - a) for s, a, b in zip(start, query_start, query_start[1:], strict=False)]
    return tokens, positions, slots, seq_lens, block_tables[rows.long(), :num_blocks].tolist()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("lens", "num_blocks"), [
    ([(1, 5)], 1), ([(1, 9), (1, 40), (1, 16)], 3), ([(1, 33), (300, 300), (20, 50), (1, 1)], 1500), ([(257, 300)], 20),
    ([(1, 3), (0, 0), (0, 0)], 2),
])  # fmt: skip
def test_inputs_are_prepared_as_a_loop_over_tokens_does(
    lens: list[tuple[int, int]], num_blocks: int, index_dtype: torch.dtype
) -> None:
    random, max_rows = rng(len(lens)), len(lens) + 3
    queries = torch.tensor([q for q, _ in lens])
    token_ids = torch.randint(0, 999, (int(queries.sum()),), generator=random)
    token_ids[::3] = -1
    given = (
        token_ids, torch.randperm(max_rows, generator=random)[: len(lens)], torch.tensor([0, *queries]).cumsum(0),
        torch.tensor([s - q for q, s in lens]), torch.randint(0, 999, (max_rows,), generator=random),
        torch.randint(1, 99, (max_rows, 1600), generator=random),
    )  # fmt: skip
    typed = tuple(t.to(index_dtype) for t in given)
    actual = prepare_step(*(t.to(DEVICE) for t in typed), num_blocks, block_size=16)
    assert all(t.dtype == index_dtype for t in actual)
    assert tuple(t.tolist() for t in actual) == prepared(*typed, 16, num_blocks)


def test_tokens_beyond_the_last_query_get_slots_in_block_0() -> None:
    """As steps of static shape have them; their positions may lie beyond the block table."""
    values = [torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in
              ([7, -1, 8, 8, 8], [1], [0, 2], [30], [3, 4], [[5, 6], [9, 2]])]  # fmt: skip
    tokens, positions, slots, *_ = prepare_step(*values, 2, block_size=16)
    assert tokens.tolist()[:2] == [7, 4] and positions.tolist()[:2] == [30, 31]
    assert slots.tolist() == [2 * 16 + 14, 2 * 16 + 15, 0, 1, 2]


def test_the_kernels_are_registered() -> None:
    registry = builtin_registry()
    for kernel in KERNELS:
        registry.add(kernel)
    assert {"sample", "sample_rows", "penalties", "logprobs", "embed"} <= {kernel.op for kernel in KERNELS}
