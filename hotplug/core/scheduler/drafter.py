"""What a speculating request proposes: tokens by prompt lookup, as many as its recent proposals were worth.

Proposals never change an output, only how many tokens a step gives (`StepPlan.drafts`). The window follows the text:
twice as wide after a step that accepted all of it, as wide as what was accepted after one that did not. It is a power
of two, so that steps come in few sizes. Where the first proposal is wrong, matches are passed over, twice as many each
time, so that a text that does not repeat costs next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hotplug.core.errors import ConfigError
from hotplug.core.request import SamplingParams
from hotplug.core.scheduler.ngram import NgramIndex, continuation
from hotplug.core.scheduler.plan import IntArray

_FIRST_WINDOW = 2
_MOST_PASSED_OVER = 63
_NONE = np.empty(0, np.int32)


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """How requests speculate. Raises ConfigError for lengths that cannot be."""

    by_default: bool
    """Whether requests do that do not say."""
    tokens: int = 8
    """Most tokens proposed for a request in a step: so many or the next power of two below."""
    shortest: int = 3
    longest: int = 8
    """Tokens of the n-grams that are looked up."""
    max_requests: int = 8
    """Most requests that decode at once while any of them speculates."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.max_requests < 1:
            raise ConfigError(f"speculation of {self.tokens} tokens for {self.max_requests} requests",
                              why="both are at least 1")  # fmt: skip
        if not 1 <= self.shortest <= self.longest:
            raise ConfigError(f"n-grams of {self.shortest} to {self.longest} tokens",
                              why="the shortest has 1 token at least and is no longer than the longest")  # fmt: skip


def obstacle(params: SamplingParams) -> str:
    """Which parameter keeps a request from speculating; empty if none does.

    Penalties and logits processors depend on the tokens before, which are not known when several are verified at once.
    """
    if params.logits_processors:
        return "logits_processors"
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    return next((name for name, value in neutral.items() if getattr(params, name) != value), "")


class Drafter:
    """The proposals of one request, over its whole life."""

    def __init__(self, config: Speculation) -> None:
        self._index = NgramIndex(config.shortest, config.longest)
        self._most = config.tokens
        self._window = min(_FIRST_WINDOW, self._most)
        self._misses = 0
        """Proposals in a row of which nothing was accepted."""
        self._passed_over = 0
        """Matches yet to be passed over."""

    def draft(self, tokens: IntArray, most: int) -> IntArray:
        """Up to `most` (1 at least) tokens that may follow `tokens` [n], the request's prompt and output so far."""
        match = self._index.find(tokens)
        if match is None:
            return _NONE
        if self._passed_over:
            self._passed_over -= 1
            return _NONE
        count = min(self._window, most)
        return continuation(tokens, match[0], 1 << (count.bit_length() - 1))

    def expects(self, tokens: IntArray) -> bool:
        """Whether there will probably be proposals once the token after `tokens` [n] is known."""
        return not self._passed_over and self._index.find(tokens) is not None

    def learn(self, proposed: int, accepted: int) -> None:
        """Take note of how many of the `proposed` tokens were right."""
        if accepted:
            self._misses = 0
            self._window = min(2 * max(self._window, proposed), self._most) if accepted == proposed else accepted
        else:
            self._misses += 1
            self._window = max(self._window // 2, 1)
            self._passed_over = min(2**self._misses - 1, _MOST_PASSED_OVER)
