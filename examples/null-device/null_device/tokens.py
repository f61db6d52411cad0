"""The tokens: each follows from the one before by a linear congruential generator over the whole vocabulary.

Its period is the vocabulary (Hull and Dobell, 1962), so no token comes twice before all came once: a token that was
lost, doubled or mixed up with another request's breaks the chain, and whoever knows the prompt's last token can tell.
"""

from __future__ import annotations

from functools import cache
from math import gcd


@cache
def generator(vocab: int) -> tuple[int, int]:
    """Multiplier and increment of a full period over `vocab` tokens."""
    step = 4 if vocab % 4 == 0 else 1
    rest, prime = vocab, 2
    while rest > 1:
        if rest % prime == 0:
            step = step if step % prime == 0 else step * prime
            rest //= prime
        else:
            prime += 1 if prime * prime <= rest else rest - prime
    increment = max(1, int(vocab * 0.618))
    while gcd(increment, vocab) != 1:
        increment += 1
    return (step + 1) % vocab if vocab > 1 else 0, increment


def next_token(token: int, vocab: int) -> int:
    """The token that follows `token`."""
    multiplier, increment = generator(vocab)
    return (multiplier * token + increment) % vocab


def chain(token: int, vocab: int, length: int) -> list[int]:
    """The `length` tokens that follow a prompt which ends in `token`."""
    found = []
    for _ in range(length):
        token = next_token(token, vocab)
        found.append(token)
    return found
