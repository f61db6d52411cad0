"""examples/toy-compile, installed as a vendor's package would be: compiled steps give the CPU platform's tokens."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from prompts import PROMPTS
from throwaway import run_python, write_distribution

EXAMPLE = Path(__file__).parent.parent / "examples" / "toy-compile"

GENERATE = """
import json, sys
from hotplug import LLM, SamplingParams

model, prompts = sys.argv[1], json.loads(sys.argv[2])
found = {}
for device, turn in (("cpu", ""), ("toy_compile", "first"), ("toy_compile", "second")):
    llm = LLM(model, device=device, dtype="float32", quantization="none", max_model_len=128, max_num_seqs=4,
              block_size=32 if turn else 16, kv_cache_memory="64MiB")
    llm.core.wait_until_compiled()
    platform = llm.core.bound.placement.platform
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (8, 12, 16)]
    report = llm.core.report()
    found[turn or device] = {
        "tokens": [o.outputs[0].token_ids for o in llm.generate(prompts, params, progress=False)],
        "shapes": report["shapes"],
        "compiled": platform.num_compiled() if turn else 0,
        "recompiles": llm.core.stats().recompiles,
        "seconds": [e["seconds"] for e in report.get("compiled", [])],
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package as installed, with its entry point."""
    folder = tmp_path_factory.mktemp("toy-compile")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    modules = {str(p.relative_to(EXAMPLE)): p.read_text() for p in (EXAMPLE / "toy_compile").glob("*.py")}
    write_distribution(folder, project["name"], version=project["version"],
                       entry_points=project["entry-points"], modules=modules)  # fmt: skip
    return folder


@pytest.mark.slow
def test_its_greedy_tokens_are_the_cpu_platforms_and_a_second_start_compiles_nothing(
    installed: Path, smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = run_python(installed, "-W", "ignore", "-c", GENERATE, str(smollm2_path), json.dumps(PROMPTS[:3]))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["first"]["tokens"] == found["cpu"]["tokens"]
    assert found["first"]["shapes"] == [[1, 1], [4, 4], [32, 1], [128, 1]]
    assert found["first"]["compiled"] == 4
    assert found["second"]["tokens"] == found["cpu"]["tokens"]
    assert found["second"]["compiled"] == 0
    assert found["first"]["recompiles"] == found["second"]["recompiles"] == 0


@pytest.mark.slow
def test_its_own_tests_pass(installed: Path) -> None:
    done = run_python(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests"), cwd=installed)
    assert "6 passed" in done.stdout, done.stdout + done.stderr
