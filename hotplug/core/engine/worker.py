"""The process of a rank other than the first: builds its part of the engine, then runs the steps it is given."""

from __future__ import annotations

import os
import signal
import socket
import threading
import traceback
from collections import deque

from hotplug.core.errors import HotplugError
from hotplug.core.parallel.channel import Begin, RankChannel, RankFailed

_FAILED = 1
_KEPT = 2
"""Steps whose tokens may still be on their way to the host, which nobody reads here."""


def main(end: int, life: int) -> None:
    """Entry of the process, with two file descriptors: of its link to rank 0, and of a pipe that ends with rank 0."""
    # A signal to the whole process group is the front end's to handle; this process ends with rank 0.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(life,), name="hotplug-life", daemon=True).start()
    link = RankChannel(socket.socket(fileno=end))
    try:
        begin = link.receive()
        assert isinstance(begin, Begin)
        _serve(link, begin)
    except EOFError:
        os._exit(_FAILED)  # rank 0 is gone
    except BaseException as e:
        link.send(RankFailed(str(e) or type(e).__name__, traceback.format_exc(), isinstance(e, HotplugError)))
        os._exit(_FAILED)  # other threads, and peers in a collective, are not waited for


def _serve(link: RankChannel, begin: Begin) -> None:
    from hotplug.core.config import EngineConfig
    from hotplug.core.engine.process import freeze_started_objects
    from hotplug.core.parallel.encoding import decode_plan
    from hotplug.core.parallel.leader import Leader
    from hotplug.core.parallel.mesh import Mesh
    from hotplug.core.startup.start import start_rank

    config = EngineConfig.from_mapping(begin.config)
    leader = Leader(link, begin, Mesh.of(config))
    worker = start_rank(config, leader).worker
    freeze_started_objects()
    leader.ready()
    handles = deque[object](maxlen=_KEPT)
    with worker.step_guard:
        while True:
            handles.append(worker.runner.execute(decode_plan(leader.steps.receive())))


def _end_with(life: int) -> None:
    """End this process, whatever it does, when the other end of the pipe is closed."""
    os.read(life, 1)
    os._exit(0)
