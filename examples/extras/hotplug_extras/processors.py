"""Two logits processors: tokens that may never come, and tokens that may not come again soon."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Ban:
    """The given tokens never come."""

    def __init__(self, vocab_size: int, *, tokens: Sequence[int]) -> None:
        if not tokens or not all(isinstance(t, int) and 0 <= t < vocab_size for t in tokens):
            raise ValueError(f"tokens must hold token ids from 0 to {vocab_size - 1}")
        self._tokens = torch.tensor(tokens)

    def start(self, token_ids: Tensor, num_prompt_tokens: int) -> None:
        self._tokens = self._tokens.to(token_ids.device)

    def apply(self, logits: Tensor) -> None:
        logits[self._tokens] = float("-inf")

    def accept(self, token: Tensor) -> None:
        pass


class NoRepeat:
    """No token comes again within `window` tokens; prompt and output count."""

    def __init__(self, vocab_size: int, *, window: int) -> None:
        if not isinstance(window, int) or not 0 < window < vocab_size:
            raise ValueError(f"window must be from 1 to {vocab_size - 1}")
        self._window = window
        self._recent = torch.zeros(0, dtype=torch.int64)

    def start(self, token_ids: Tensor, num_prompt_tokens: int) -> None:
        self._recent = token_ids[-self._window :]

    def apply(self, logits: Tensor) -> None:
        logits[self._recent] = float("-inf")

    def accept(self, token: Tensor) -> None:
        self._recent = torch.cat((self._recent, token.view(1)))[-self._window :]
