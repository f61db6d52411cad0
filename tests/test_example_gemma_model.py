"""examples/gemma-model: an architecture and an op from a package, equal to transformers, open to kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_runs import ModelRun
from plugin_examples import activate, install
from throwaway import run_python, write_distribution

from hotplug.core.errors import UnsupportedModelError

PROMPT = [(5 * i * i + 11 * i + 3) % 64 for i in range(19)]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A saved random Gemma and transformers' logits of PROMPT, float32 [len(PROMPT), vocab]."""
    import transformers

    torch.manual_seed(0)
    model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES)).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15) if parameter.dim() > 1 else parameter.uniform_(-0.5, 0.5)
        logits = model(torch.tensor([PROMPT])).logits[0]
    folder = tmp_path_factory.mktemp("gemma")
    model.save_pretrained(folder)
    return folder, logits


@pytest.mark.parametrize("chunks", [[19], [3, 9, 2, 5], [6, *[1] * 13]], ids=["whole", "chunks", "decodes"])
def test_its_logits_equal_transformers(
    monkeypatch: pytest.MonkeyPatch, reference: tuple[Path, torch.Tensor], chunks: list[int]
) -> None:
    activate(monkeypatch, "gemma-model")
    folder, expected = reference
    assert expected.std() > 0.1
    assert (ModelRun(folder).logits(PROMPT, chunks) - expected).abs().max() < TOLERANCE


def test_without_the_package_the_architecture_is_refused(reference: tuple[Path, torch.Tensor]) -> None:
    with pytest.raises(UnsupportedModelError, match="GemmaForCausalLM"):
        ModelRun(reference[0])


def test_another_activation_is_refused_by_its_reader(
    monkeypatch: pytest.MonkeyPatch, reference: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    activate(monkeypatch, "gemma-model")
    values = json.loads((reference[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "hidden_activation": "relu"}))
    with pytest.raises(UnsupportedModelError, match="activation 'relu'"):
        ModelRun(tmp_path, load_format="dummy")


PLATFORM = """
import torch
from hotplug.vendor import DeviceInfo, Impl, Limits, MemoryInfo

def gelu_mul(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return up * torch.nn.functional.gelu(gate, approximate="tanh")

class Acme:
    name, torch_device, api_version = "acme", "cpu", "2.0"
    def probe(self): return [DeviceInfo(index=0, name="Acme 1", arch="v1")]
    def limits(self, device): return Limits(dtypes=("float32",), shared_host_memory=True)
    def memory(self, device): return MemoryInfo(free=1 << 30, total=1 << 30)
    def register(self, ops):
        if "gelu_mul" in ops.names:
            ops.add(Impl("gelu_mul", "acme", make=lambda _: gelu_mul))
"""
GENERATE = """
import json, sys
from hotplug import SamplingParams
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.request import Request
found = {}
for device in ("cpu", "acme"):
    core = EngineCore(EngineConfig(model=sys.argv[1], device=device, kv_cache_memory="4MiB"))
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    core.add(Request(id="r", prompt_token_ids=json.loads(sys.argv[2]), sampling=params))
    tokens = []
    while core.has_work:
        tokens += [t for delta in core.step() for t in delta.token_ids]
    sites = {s["site"]: s["provider"] for s in core.report()["sites"]}
    found[device] = {"tokens": tokens, "gate": sites["layers.0.mlp.act"]}
print(json.dumps(found))
"""


def test_installed_beside_a_platform_its_op_runs_the_platforms_kernel(
    reference: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    install(tmp_path, "gemma-model")
    write_distribution(tmp_path, "acme", modules={"acme.py": PLATFORM},
                       entry_points={"hotplug.platforms": {"acme": "acme:Acme"}})  # fmt: skip
    done = run_python(tmp_path, "-W", "ignore", "-c", GENERATE, str(reference[0]), json.dumps(PROMPT))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["cpu"]["gate"] == "reference"
    assert found["acme"]["gate"] == "acme"
    assert len(found["cpu"]["tokens"]) == 8
    assert found["cpu"]["tokens"] == found["acme"]["tokens"]
