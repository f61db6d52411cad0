"""A chat-like load: lognormal lengths, random token ids, Poisson arrivals; one plan, whoever sends it.

`requests` makes the plan, `batch` the same lengths all at once. Both follow from a seed alone, so every engine and
server gets the same token ids at the same times. This module imports nothing that is not Python's own: an engine's
environment may lack everything else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

FIRST_TOKEN, LAST_TOKEN = 1000, 30_000
"""Token ids are drawn from this range, which every model's vocabulary has; below are special tokens."""
PROMPT = (5.0, 1.0, 8, 2000)
"""Mean and deviation of the length's logarithm, its least and its most: median 148, mean 235."""
OUTPUT = (5.2, 0.8, 8, 1000)
"""Of the output: median 181, mean 242."""


@dataclass(frozen=True)
class Asked:
    """One request: when it is sent, in seconds from the start, its prompt, and how many tokens it wants."""

    at: float
    prompt: list[int]
    outputs: int


def _length(draw: random.Random, shape: tuple[float, float, int, int]) -> int:
    mean, deviation, least, most = shape
    return int(min(most, max(least, draw.lognormvariate(mean, deviation))))


def requests(rate: float, seconds: float, seed: int, most: int = 0, vocabulary: int = LAST_TOKEN) -> Iterator[Asked]:
    """Requests of `seconds` at `rate` a second on average, in order of time.

    `most` cuts prompts and outputs to so many tokens, and `vocabulary` the ids, for a model that has room for no more.
    """
    draw, at = random.Random(seed), 0.0
    first = min(FIRST_TOKEN, vocabulary // 2)
    while (at := at + draw.expovariate(rate)) < seconds:
        inputs, outputs = _length(draw, PROMPT), _length(draw, OUTPUT)
        if most:
            inputs, outputs = min(inputs, most), min(outputs, most)
        yield Asked(at, [draw.randrange(first, vocabulary) for _ in range(inputs)], outputs)


def batch(count: int, seed: int, most: int = 0, vocabulary: int = LAST_TOKEN) -> list[Asked]:
    """`count` requests at once: the same lengths for every seed, other token ids."""
    lengths, draw = random.Random(f"chat{count}"), random.Random(f"chat{count}{seed}")
    first = min(FIRST_TOKEN, vocabulary // 2)
    found = []
    for _ in range(count):
        inputs, outputs = _length(lengths, PROMPT), _length(lengths, OUTPUT)
        if most:
            inputs, outputs = min(inputs, most), min(outputs, most)
        found.append(Asked(0.0, [draw.randrange(first, vocabulary) for _ in range(inputs)], outputs))
    return found
