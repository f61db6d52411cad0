"""What a request proposes: the n-gram index against a search that looks at everything, and the window that adapts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotplug.core.errors import ConfigError
from hotplug.core.request import SamplingParams
from hotplug.core.scheduler.drafter import Drafter, Speculation, obstacle
from hotplug.core.scheduler.ngram import NgramIndex, continuation


def int32(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def searched(tokens: list[int], shortest: int, longest: int) -> tuple[int, int] | None:
    """The index's answer, found by comparing every n-gram."""
    n = len(tokens)
    for length in range(min(longest, n - 1), shortest - 1, -1):
        for end in range(n - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[n - length :]:
                return end, length
    return None


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.lists(st.integers(0, 4), max_size=200), st.integers(1, 4), st.integers(0, 5), st.data())
def test_the_index_finds_what_a_search_finds(tokens: list[int], shortest: int, more: int, data: st.DataObject) -> None:
    """A long beginning at once, as prompts are, then as the text grows."""
    index = NgramIndex(shortest, shortest + more)
    known = data.draw(st.integers(0, len(tokens)))
    while known <= len(tokens):
        assert index.find(int32(tokens[:known])) == searched(tokens[:known], shortest, shortest + more)
        known += data.draw(st.integers(1, 4))


def test_token_ids_that_give_equal_keys_are_told_apart() -> None:
    """Keys are 64 bits of three tokens' 96: what an equal key points to is compared."""
    index = NgramIndex(3, 3)
    index._later = {int(key): [3] for key in range(-5, 5)}
    index._later |= {key: [3] for key in _keys_of([7, 8, 9])}
    index._next = 4
    assert index.find(int32([1, 2, 3, 7, 8, 9])) is None


def _keys_of(tokens: list[int]) -> list[int]:
    from hotplug.core.scheduler.ngram import _keys

    return _keys(int32(tokens), len(tokens)).tolist()


def test_a_text_that_repeats_itself_goes_on_repeating() -> None:
    tokens = int32([9, 1, 2, 3, 1, 2, 3])
    assert continuation(tokens, 4, 7).tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert continuation(tokens, 6, 3).tolist() == [3, 3, 3]


def drafter(**options: int) -> Drafter:
    return Drafter(Speculation(by_default=True, shortest=2, **options))


LOOP = int32([1, 2, 3, 4] * 6)


def test_the_window_doubles_while_all_is_accepted_and_shrinks_to_what_was() -> None:
    one = drafter(tokens=8)
    sizes = []
    for accepted in (2, 4, 8, 8, 3, 3, 6):
        draft = one.draft(LOOP, 100)
        sizes.append(len(draft))
        one.learn(len(draft), min(accepted, len(draft)))
    assert sizes == [2, 4, 8, 8, 8, 2, 4]


def test_proposals_are_a_power_of_two() -> None:
    one = drafter(tokens=7)
    sizes = []
    for most in (9, 9, 9, 3, 1, 9):
        sizes.append(len(one.draft(LOOP, most)))
        one.learn(sizes[-1], sizes[-1])
    assert sizes == [2, 4, 4, 2, 1, 4]


def test_no_more_is_proposed_than_there_is_room_for() -> None:
    one = drafter()
    assert one.draft(LOOP, 1).tolist() == [1]


def test_wrong_proposals_make_it_pass_over_matches_twice_as_many_each_time() -> None:
    one = drafter()
    gaps, gap = [], 0
    for _ in range(400):
        draft = one.draft(LOOP, 8)
        if len(draft):
            one.learn(len(draft), 0)
            gaps.append(gap)
            gap = 0
        else:
            gap += 1
    assert gaps[:8] == [0, 1, 3, 7, 15, 31, 63, 63]


def test_one_right_proposal_ends_the_passing_over() -> None:
    one = drafter()
    for _ in range(3):
        one.learn(1, 0)
    for _ in range(7):
        assert not one.expects(LOOP)
        assert not len(one.draft(LOOP, 8))
    assert len(one.draft(LOOP, 8)) == 1
    one.learn(1, 1)
    assert one.expects(LOOP)
    assert len(one.draft(LOOP, 8)) == 2


def test_a_text_without_repetition_has_no_proposals() -> None:
    one = drafter()
    assert not len(one.draft(int32(list(range(50))), 8))
    assert not one.expects(int32(list(range(50))))


@pytest.mark.parametrize(
    "options", [{"tokens": 0}, {"max_requests": 0}, {"shortest": 0}, {"shortest": 5, "longest": 4}]
)
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Speculation(by_default=True, **options)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, ""),
        ({"logprobs": 2, "logit_bias": {3: 1.0}, "min_tokens": 3, "top_p": 0.5, "stop": ("x",)}, ""),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"presence_penalty": -0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.1}, "frequency_penalty"),
        ({"logits_processors": {"some": {}}}, "logits_processors"),
    ],
)
def test_what_depends_on_each_token_before_is_an_obstacle(params: dict, expected: str) -> None:
    assert obstacle(SamplingParams(**params)) == expected
