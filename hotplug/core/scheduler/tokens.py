"""What one step gave, in columns: a row that only gained a token is an entry of two arrays, not an object.

Whatever else a step may give (a first token, an end, several tokens, log-probabilities) is a `TokenDelta`. Also here:
token ids as arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hotplug.core.errors import RequestError
from hotplug.core.request import TokenDelta
from hotplug.core.scheduler.plan import BoolArray, IntArray

TagArray = npt.NDArray[np.int64]
IdArray = npt.NDArray[np.object_]

CLIENT_SHIFT = 32
"""A tag is `client << CLIENT_SHIFT | slot` (`Request.tag`)."""


@dataclass(frozen=True, slots=True, eq=False)
class StepTokens:
    """The tokens of a step. Iterating gives all of it as deltas, one a request."""

    tags: TagArray = field(default_factory=lambda: np.empty(0, np.int64))
    """[n] int64 tags of the requests that gained one token and nothing else."""
    tokens: IntArray = field(default_factory=lambda: np.empty(0, np.int32))
    """[n] int32 their tokens."""
    ids: IdArray = field(default_factory=lambda: np.empty(0, np.object_))
    """[n] their request ids."""
    deltas: list[TokenDelta] = field(default_factory=list)
    """All that is not a single token."""

    def __len__(self) -> int:
        return len(self.tags) + len(self.deltas)

    def __iter__(self) -> Iterator[TokenDelta]:
        columns = zip(self.ids.tolist(), self.tokens.tolist(), self.tags.tolist(), strict=True)
        for request_id, token, tag in columns:
            yield TokenDelta(request_id, [token], tag=tag)
        yield from self.deltas

    @property
    def num_tokens(self) -> int:
        return len(self.tags) + sum(len(delta.token_ids) for delta in self.deltas)

    def of_client(self, client: int) -> StepTokens:
        """What belongs to the requests of one front end."""
        own: BoolArray = self.tags >> CLIENT_SHIFT == client
        deltas = [delta for delta in self.deltas if delta.tag >> CLIENT_SHIFT == client]
        return StepTokens(self.tags[own], self.tokens[own], self.ids[own], deltas)


def token_array(token_ids: Sequence[int] | npt.NDArray[np.integer]) -> IntArray:
    """Token ids of a prompt as [n] int32, not copied if they are. Whether a vocabulary has them is not looked at.

    Raises RequestError for what is no such thing, and for a negative id, which an index would take from the end.
    """
    try:
        array = np.asarray(token_ids)
    except Exception as e:  # lists of several lengths, tensors of a device, objects that refuse
        raise RequestError("the prompt is not a flat list of token ids", param="prompt") from e
    if array.ndim != 1:
        raise RequestError("the prompt is not a flat list of token ids", param="prompt")
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.dtype != np.int32:
        # Integers that no 64-bit type holds become objects or floats.
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= 2**31:
            raise RequestError("a token id of the prompt is negative or not a 32-bit integer", param="prompt")
        array = array.astype(np.int32)
    return array
