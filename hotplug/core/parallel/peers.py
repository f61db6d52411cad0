"""What an engine's rank needs of the others while it starts, whichever rank it is."""

from __future__ import annotations

from typing import Protocol


class Peers(Protocol):
    """The other ranks, as one of them sees them. The methods are called once each, in this order, by every rank."""

    @property
    def rank(self) -> int:
        """The rank of this process."""
        ...

    def join(self, plan: str) -> None:
        """Wait until every rank has its weights, and enter the process group with them. `plan` is the plan's hash.

        Raises EngineDeadError where a rank has ended, or has another plan.
        """
        ...

    def agree(self, blocks: int) -> int:
        """The KV blocks that all ranks have room for, given one's own. Raises EngineDeadError."""
        ...

    def ready(self) -> None:
        """From here on, steps come. Rank 0 waits until all others say so. Raises EngineDeadError."""
        ...

    def close(self) -> None:
        """Part with them."""
        ...
