"""Ids of special tokens that files name: those outside the vocabulary are left out, with one warning that says so.

llama.cpp does the same. Such an id can never be sampled, and a kernel that is given it reads out of bounds.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from hotplug.core.weights.metadata import Metadata, shown

Named = Sequence[tuple[Metadata, str]]
"""Where files name ids: accessor and key."""


def known_tokens(named: Named, vocab_size: int) -> tuple[int, ...]:
    """The ids that a vocabulary of `vocab_size` has, in order, each once.

    Raises ModelError for a value that is neither a whole number nor a list of them.
    """
    ids = (token for meta, key in named for token in meta.one_or_many(key))
    return tuple(dict.fromkeys(token for token in ids if 0 <= token < vocab_size))


def warn_of_unknown_tokens(named: Named, vocab_size: int) -> None:
    """One warning for each key with ids that the vocabulary has not. Repeated for the same file, it is shown once."""
    for meta, key in named:
        outside = [token for token in meta.one_or_many(key) if not 0 <= token < vocab_size]
        if outside:
            warnings.warn(
                f"{meta.where}: {key} {shown(outside[0] if len(outside) == 1 else outside)} is ignored: the vocabulary "
                f"has {vocab_size:,} tokens",
                stacklevel=2,
            )
