"""examples/null-device, installed as a vendor's package would be: engine processes find it and keep its time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from plugin_examples import EXAMPLES, install
from throwaway import run_python

SERVE = """
import asyncio, json, os, sys
from hotplug import AsyncLLM, SamplingParams
from hotplug.core.config import EngineConfig
from null_device.tokens import chain

async def main():
    llm = AsyncLLM(EngineConfig(model=sys.argv[1], device="null_device", load_format="dummy", kv_cache_memory="8MiB"))
    await llm.start()
    await llm.wait_ready()
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    outputs = await asyncio.gather(*(llm.generate([2, 30 + i], params) for i in range(20)))
    right = [o.outputs[0].token_ids == chain(30 + i, llm.vocab_size, 24) for i, o in enumerate(outputs)]
    await llm.close()
    print(json.dumps(right))

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package as installed, with its entry point."""
    folder = tmp_path_factory.mktemp("null-device")
    install(folder, "null-device")
    return folder


def test_its_own_tests_pass(installed: Path) -> None:
    tests = str(EXAMPLES / "null-device" / "tests")
    done = run_python(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, cwd=installed)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr


def test_an_engine_process_gives_each_request_its_chain_at_the_device_s_pace(
    installed: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NULL_DEVICE_STEP_MS", "20")
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    begin = time.perf_counter()
    done = run_python(installed, str(script), str(tiny_model))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True] * 20
    assert time.perf_counter() - begin >= 24 * 0.02


def test_a_setting_that_is_no_time_is_told(installed: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setenv("NULL_DEVICE_STEP_MS", "soon")
    done = run_python(installed, "-m", "hotplug.cli", "explain", str(tiny_model), "--device", "null_device",
                      "--load-format", "dummy")  # fmt: skip
    assert done.returncode != 0
    assert "NULL_DEVICE_STEP_MS" in done.stderr and "soon" in done.stderr, done.stderr
