"""Random requests for `soak.py`: what is sent, and what must come back."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

STEMS, STEM_TOKENS = 4, 600
"""Prefixes that a third of the prompts begin with, as conversations and system prompts do."""
BAD: Sequence[tuple[dict[str, Any] | str, int]] = (
    ("{", 400),
    ({"prompt": "a", "max_tokens": -1}, 400),
    ({"prompt": "a", "temprature": 0}, 400),
    ({"prompt": "a", "temperature": 1e6}, 400),
    ({"prompt": "a", "logit_bias": {"99999999": 1}}, 400),
    ({"prompt": [2**31]}, 400),
    ({"prompt": ""}, 400),
    ({"prompt": [5] * 100_000}, 400),
    ({"prompt": "a", "model": "another"}, 404),
)
"""Bodies that are refused, over a right `model`, and the status that says so."""


@dataclass(frozen=True)
class Case:
    """One request. `path` and `content` are what is sent."""

    path: str
    content: str
    status: int = 200
    stream: bool = False
    choices: int = 1
    most: int = 0
    """Tokens that a choice has at most."""
    least: int = 0
    """Tokens that a choice has at least, where nothing but the length can end it."""
    leave_after: float | None = None
    """Seconds after which the client is gone; None = it stays."""
    leave_at: int | None = None
    """Events of a stream after which it is gone."""

    @property
    def leaves(self) -> bool:
        return self.leave_after is not None or self.leave_at is not None


def cases(model: str, vocab: int, context: int, count: int, *, longest: int, seed: int) -> Iterator[Case]:
    """`count` requests with prompts of 1 to `longest` tokens, short ones more often; the same ones for a seed."""
    rng = random.Random(seed)
    stems = [_tokens(rng, vocab, STEM_TOKENS) for _ in range(STEMS)]
    for _ in range(count):
        if rng.random() < 0.06:
            body, status = rng.choice(BAD)
            yield Case(
                "/v1/completions", body if isinstance(body, str) else json.dumps({"model": model, **body}), status
            )
        else:
            yield _good(rng, model, vocab, context, stems, longest)


def _good(
    rng: random.Random, model: str, vocab: int, context: int, stems: Sequence[list[int]], longest: int
) -> Case:  # fmt: skip
    length = round(longest ** rng.random())
    choices = rng.choice((1, 1, 1, 1, 2, 3))
    body: dict[str, Any] = {"model": model, "n": choices, **_sampling(rng, vocab)}
    if rng.random() < 0.2:
        path, letters = "/v1/chat/completions", "".join(rng.choice("abc def\n") for _ in range(min(length, 400)))
        body["messages"] = [{"role": "user", "content": letters}]
        length = 400 + len(letters)  # a template's own tokens, and at most one a letter
        body |= rng.choice(({}, {}, {"logprobs": True, "top_logprobs": rng.randint(0, 5)}))
    else:
        path = "/v1/completions"
        own = _tokens(rng, vocab, length)
        body["prompt"] = (rng.choice(stems) + own)[:length] if rng.random() < 0.33 else own
        body |= rng.choice(({}, {}, {"logprobs": rng.randint(0, 5)}))
    leaves = rng.random() < 0.15
    most = max(1, min(round(120 ** rng.random()) * (4 if leaves else 1), context - length))
    body["max_tokens"] = most
    stream = rng.random() < 0.5
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    elif path == "/v1/completions" and rng.random() < 0.1:
        body["echo"] = True
    free = body.get("ignore_eos") and "stop" not in body and "stop_token_ids" not in body
    least = most if free else 0
    by_time = leaves and (not stream or rng.random() < 0.5)
    return Case(path, json.dumps(body), 200, stream, choices, most, least,
                leave_after=rng.uniform(0.0, 3.0) if by_time else None,
                leave_at=rng.randint(0, 12) if leaves and not by_time else None)  # fmt: skip


def _tokens(rng: random.Random, vocab: int, count: int) -> list[int]:
    return [rng.randrange(vocab) for _ in range(count)]


def _sampling(rng: random.Random, vocab: int) -> dict[str, Any]:
    """Sampling parameters, each there or not."""
    options: tuple[dict[str, Any], ...] = (
        {"temperature": rng.choice((0.0, 0.0, 0.7, 1.5))},
        {"top_p": rng.uniform(0.1, 1.0)},
        {"top_k": rng.randint(1, 100)},
        {"min_p": rng.uniform(0.0, 0.2)},
        {"seed": rng.randrange(2**31)},
        {"presence_penalty": rng.uniform(-2, 2), "frequency_penalty": rng.uniform(-2, 2)},
        {"repetition_penalty": rng.uniform(0.8, 1.5)},
        {"logit_bias": {str(rng.randrange(vocab)): rng.uniform(-50, 50) for _ in range(rng.randint(1, 20))}},
        {"stop": [rng.choice(("e", "the", "\n", "zzz"))]},
        {"stop_token_ids": _tokens(rng, vocab, 12)},
        {"min_tokens": 1},
        {"cache_salt": rng.choice(("a", "b"))},
        {"priority": rng.randint(-2, 2)},
    )
    chosen = {"ignore_eos": rng.random() < 0.6}
    for option in options:
        if rng.random() < 0.25:
            chosen |= option
    return chosen
