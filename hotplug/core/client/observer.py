"""What a front end reports of its requests as they go; metrics implement it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hotplug.core.request import EngineStats


class EngineObserver(Protocol):
    """Called on the front end's event loop; must return at once. Times in seconds."""

    def first_token(self, seconds: float) -> None:
        """Time from arrival to the first token."""

    def inter_token(self, seconds: float, tokens: int) -> None:
        """Time since the sequence's last tokens, when `tokens` more arrive."""

    def inter_tokens(self, seconds: Sequence[float]) -> None:
        """One more token each of several sequences, and the time since its last. Once a step."""

    def queued(self, seconds: float) -> None:
        """Time from arrival to first being scheduled."""

    def finished(self, reason: str, prompt_tokens: int, output_tokens: int, seconds: float) -> None:
        """A sequence ended: its finish reason, "abort" or "error"; its sizes and time from arrival."""

    def stats(self, stats: EngineStats) -> None:
        """The engine's own counts, after a step."""
