"""Log-probabilities as columns, from entries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hotplug.core.logprobs import Columns, PromptLogprobs, PromptScores, TokenLogprobs


def columns(entries: Sequence[TokenLogprobs]) -> Columns:
    """Of entries that have as many alternatives each."""
    return Columns(
        np.array([entry.token_ids for entry in entries], np.int32),
        np.array([entry.logprobs for entry in entries], np.float32),
        np.array([entry.rank for entry in entries], np.int32),
    )


def of_prompt(entries: Sequence[TokenLogprobs], top: int) -> PromptLogprobs:
    """What is sent of a prompt whose tokens after the first have these."""
    scores = PromptScores(1 + len(entries), top)
    if entries:
        scores.put(0, columns(entries))
    return scores.sent()
