"""Whether an engine's process can be started: it imports the main script of its parent before anything else.

That is how `multiprocessing` spawns. A script that starts an engine wherever it is imported would so start one in the
engine's process, and so on; what then happens is told here in one sentence, in the parent.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

from hotplug.core.errors import ConfigError

ENGINE = "hotplug-engine"
"""Name of an engine's process."""
EXIT_NO_GUARD = 78
"""Its exit code where the main script would start another engine in it."""
NO_GUARD = (
    "the script starts an AsyncLLM wherever it is imported, and the engine's process imports it. "
    'Put what starts it under `if __name__ == "__main__":`.'
)


def require_startable() -> None:
    """Raises ConfigError where no engine's process can be started; in such a process itself, SystemExit."""
    here = multiprocessing.current_process()
    if getattr(here, "_inheriting", False):  # the main script is being imported; `multiprocessing` asks so too
        if here.name == ENGINE:
            raise SystemExit(EXIT_NO_GUARD)
        raise ConfigError(NO_GUARD)
    if here.daemon:
        raise ConfigError("an AsyncLLM cannot start its process here", why=f"{here.name} is a daemonic process, "
                          "which may have no children", hint="Start it with daemon=False, or use LLM.")  # fmt: skip
    main = sys.modules["__main__"]
    script = None if main.__spec__ is not None else getattr(main, "__file__", None)
    if script is not None and not Path(script).exists():
        raise ConfigError("an AsyncLLM cannot start its process", why=f"that imports the main script, and {script} is "
                          "no file", hint="Save the script, or give it with `python -c`.")  # fmt: skip
