"""Entry of the `hotplug` command. Ctrl-C ends it in silence from here on, also while the command's modules load."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    try:
        from hotplug.cli.main import app
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    app(prog_name="hotplug")
