"""Logits processors: a request's own changes to its scores, by name, from plugins.

Only rows whose request names one cost anything. Order: after penalties and biases, before temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from hotplug.core.errors import HotplugError, RequestError, nearest


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
