"""AsyncLLM where its process cannot be started: one sentence, in the parent, at once."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import types
from pathlib import Path

import pytest

from hotplug import AsyncLLM
from hotplug.core.config import EngineConfig
from hotplug.core.errors import ConfigError

pytestmark = pytest.mark.timeout(120)
SCRIPT = """
import asyncio
from hotplug import AsyncLLM
from hotplug.core.config import EngineConfig

async def main():
    llm = AsyncLLM(EngineConfig(model={model!r}, load_format="dummy", kv_cache_memory=16 << 20))
    await llm.start()
    try:
        await llm.wait_ready()
    finally:
        await llm.close()

asyncio.run(main())
"""


def test_a_script_without_a_guard_is_told_in_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(model=str(tiny_model)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    *_, last = done.stderr.strip().splitlines()
    assert "the script starts an AsyncLLM wherever it is imported" in last
    assert 'under `if __name__ == "__main__":`' in last
    assert done.stderr.count("Traceback") == 1  # the script's own


def test_a_process_that_imports_such_a_script_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(ConfigError, match="the script starts an AsyncLLM wherever it is imported"):
        AsyncLLM(EngineConfig())


def test_a_script_on_standard_input_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    main = types.ModuleType("__main__")
    main.__file__ = "<stdin>"
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.raises(ConfigError, match=r"<stdin> is no file. Save the script, or give it with `python -c`"):
        AsyncLLM(EngineConfig())


def test_a_daemonic_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"which may have no children. Start it with daemon=False, or use LLM"):
        AsyncLLM(EngineConfig())
