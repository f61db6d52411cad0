"""examples/toy-capture, installed as a vendor's package would be: replays give the CPU platform's tokens."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from prompts import PROMPTS
from throwaway import run_python, write_distribution

EXAMPLE = Path(__file__).parent.parent / "examples" / "toy-capture"

GENERATE = """
import json, sys
from hotplug import LLM, SamplingParams

model, prompts = sys.argv[1], json.loads(sys.argv[2])
found = {}
for device in ("cpu", "toy_capture"):
    llm = LLM(model, device=device, dtype="float32", quantization="none", max_model_len=128, max_num_seqs=4,
              kv_cache_memory="64MiB")
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (8, 12, 16)]
    found[device] = [o.outputs[0].token_ids for o in llm.generate(prompts, params, progress=False)]
    found["shapes"] = llm.core.report()["shapes"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package as installed, with its entry point."""
    folder = tmp_path_factory.mktemp("toy-capture")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    modules = {str(p.relative_to(EXAMPLE)): p.read_text() for p in (EXAMPLE / "toy_capture").glob("*.py")}
    write_distribution(folder, project["name"], version=project["version"],
                       entry_points=project["entry-points"], modules=modules)  # fmt: skip
    return folder


def test_its_own_tests_pass(installed: Path) -> None:
    done = run_python(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests"), cwd=installed)
    assert "13 passed" in done.stdout, done.stdout + done.stderr


def test_its_greedy_tokens_are_the_cpu_platforms(installed: Path, smollm2_path: Path) -> None:
    done = run_python(installed, "-W", "ignore", "-c", GENERATE, str(smollm2_path), json.dumps(PROMPTS[:3]))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["toy_capture"] == found["cpu"]
    assert found["shapes"] == [[2, 2], [4, 4]]
