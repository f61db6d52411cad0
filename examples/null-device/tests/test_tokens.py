"""The generator of tokens."""

import pytest
from null_device.tokens import chain, next_token


@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 12, 97, 258, 1000, 2048, 49152])
def test_every_token_comes_once_before_one_comes_twice(vocab):
    assert sorted(chain(0, vocab, vocab)) == list(range(vocab))
    assert chain(0, vocab, vocab)[-1] == 0


def test_a_chain_goes_on_where_it_ended():
    first = chain(17, 49152, 40)
    assert first[0] == next_token(17, 49152)
    assert first[:10] + chain(first[9], 49152, 30) == first
