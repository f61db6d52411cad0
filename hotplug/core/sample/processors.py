"""Logits processors: a request's own changes to its scores, by name, from plugins.

Only rows whose request names one cost anything. Order: after penalties and biases, before temperature. A processor
that raises in the middle of a step ends its request, and no other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hotplug.core.errors import HotplugError, RequestError, nearest

_logger = logging.getLogger(__name__)


class LogitsProcessor(Protocol):
    """One request's state. Everything is on the device: reading a tensor on the host would stop the step."""

    def start(self, token_ids: Tensor, num_prompt_tokens: int) -> None:
        """The request enters the batch, or comes back: int64 `token_ids` [n], prompt first, then its output so far."""
        ...

    def apply(self, logits: Tensor) -> None:
        """Change the scores of the next token in place: float32 [vocab]."""
        ...

    def accept(self, token: Tensor) -> None:
        """The token that was drawn: int64, no dimension."""
        ...


Factory = Callable[..., LogitsProcessor]
"""`factory(vocab_size, **arguments)`: called for each request; raises ValueError or TypeError for its arguments."""


def make_processors(
    factories: Mapping[str, Factory], asked: Mapping[str, Mapping[str, Any]], vocab_size: int
) -> list[LogitsProcessor]:
    """The processors that a request names, in its order. Raises RequestError."""
    made = []
    for name, arguments in asked.items():
        if name not in factories:
            raise RequestError(f"there is no logits processor {name!r}", param="logits_processors",
                               hint=nearest(name, factories) if factories else "None is installed.")  # fmt: skip
        try:
            made.append(factories[name](vocab_size, **arguments))
        except HotplugError:
            raise
        except (TypeError, ValueError) as e:
            raise RequestError(f"logits processor {name}: {e}", param="logits_processors") from e
    return made


class RowProcessors:
    """The processors of one row, in the order of its request.

    Once one of them has raised, the row's scores are NaN, so that no token can be chosen and the request ends with an
    error (`hotplug.core.ops.sampling`).
    """

    def __init__(self, factories: Mapping[str, Factory], asked: Mapping[str, Mapping[str, Any]], vocab: int) -> None:
        self._made: list[LogitsProcessor] = []
        self._failed = False
        self._guarded(lambda: self._made.extend(make_processors(factories, asked, vocab)))

    def start(self, token_ids: npt.NDArray[np.int32], num_prompt_tokens: int, device: torch.device) -> None:
        """The row's tokens so far."""
        tokens = torch.from_numpy(token_ids.astype(np.int64)).to(device)
        for processor in self._made:
            self._guarded(partial(processor.start, tokens, num_prompt_tokens))

    def apply(self, logits: Tensor) -> None:
        """Change the scores of the row's next token in place."""
        for processor in self._made:
            self._guarded(partial(processor.apply, logits))
        if self._failed:
            logits.fill_(float("nan"))

    def accept(self, token: Tensor) -> None:
        """The token that was drawn."""
        for processor in self._made:
            self._guarded(partial(processor.accept, token))

    def _guarded(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception:  # a plugin's code
            _logger.exception("a logits processor failed; its request ends")
            self._failed = True
