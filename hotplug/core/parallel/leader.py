"""Another rank's side: what it tells rank 0 while it starts, and where its steps come from."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from hotplug.core.parallel import group
from hotplug.core.parallel.channel import Begin, Blocks, Loaded, Message, RankChannel, RankReady
from hotplug.core.parallel.mesh import Mesh
from hotplug.core.parallel.ring import RingReader
from hotplug.core.parallel.transport import Reader
from hotplug.core.parallel.zmq_transport import ZmqReader

M = TypeVar("M", bound=Message)


class Leader:
    """Rank 0, as rank `begin.rank` sees it. Implements `Peers`; raises EOFError where rank 0 is gone."""

    def __init__(self, link: RankChannel, begin: Begin, mesh: Mesh) -> None:
        self.rank = begin.rank
        self._link = link
        self._begin = begin
        self._mesh = mesh
        self.steps: Reader
        """Where plans come from."""
        if begin.steps.startswith("tcp://"):
            self.steps = ZmqReader(begin.steps)
        else:
            self.steps = RingReader(begin.steps, begin.rank - 1, begin.doorbell)

    def join(self, plan: str) -> None:
        self._link.send(Loaded(plan))
        self._next(RankReady)
        group.join(Path(self._begin.store), self._mesh, self.rank)

    def agree(self, blocks: int) -> int:
        self._link.send(Blocks(blocks))
        return self._next(Blocks).count

    def ready(self) -> None:
        self._link.send(RankReady())

    def close(self) -> None:
        """Nothing: the process ends."""

    def _next(self, kind: type[M]) -> M:
        message = self._link.receive()
        assert isinstance(message, kind), message
        return message
