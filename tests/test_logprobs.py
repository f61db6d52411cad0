"""Log-probabilities of a prompt in columns (`hotplug.core.logprobs`)."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from logprob_columns import columns

from hotplug.core.logprobs import PromptLogprobs, PromptScores, TokenLogprobs


def entry(token: int, top: int) -> TokenLogprobs:
    """Values that float32 holds exactly."""
    return TokenLogprobs(
        [token, *range(token, token + top)], [-token / 4, *(-i / 8 for i in range(top))], token % 7 + 1
    )


@given(st.integers(1, 40), st.integers(0, 3), st.data())
def test_chunks_in_any_sizes_give_one_entry_a_token_and_none_for_the_first(num_tokens, top, data):
    entries = [entry(i, top) for i in range(1, num_tokens)]
    scores, at = PromptScores(num_tokens, top), 0
    while at < len(entries):
        size = data.draw(st.integers(1, 10))
        scores.put(at, columns(entries[at : at + size]))
        at = 0 if at and data.draw(st.integers(0, 9)) == 0 else at + size  # a preemption: computed anew
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(scores.sent()), type=PromptLogprobs)
    expected = [None, *entries]
    assert list(sent) == expected and len(sent) == num_tokens
    assert [sent[i] for i in range(-num_tokens, num_tokens)] == expected * 2
    assert sent[1:3] == expected[1:3]
    with pytest.raises(IndexError):
        sent[num_tokens]


def test_what_is_past_the_prompt_is_dropped():
    scores = PromptScores(3, 0)
    scores.put(0, columns([entry(i, 0) for i in range(1, 6)]))
    assert list(scores.sent()) == [None, entry(1, 0), entry(2, 0)]


def test_a_chosen_token_without_a_number_is_seen_and_an_alternative_is_not_looked_at():
    scores = PromptScores(4, 1)
    chunk = columns([entry(i, 1) for i in range(1, 4)])
    chunk.logprobs[1, 1] = np.nan
    scores.put(0, chunk)
    assert scores.are_numbers
    chunk.logprobs[1, 0] = np.nan
    scores.put(0, chunk)
    assert not scores.are_numbers
