"""Plugins of the group `hotplug.plugins`: an architecture with an op of its own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from throwaway import run_python, write_distribution

from hotplug.core.errors import PlatformError
from hotplug.core.models.decoder import MODELS, Decoder
from hotplug.core.ops.registry import Op
from hotplug.core.platform.discovery import Loaded
from hotplug.plugins.extension import Extension, gather


def loaded(plugin: object = None, *, name: str = "extra", error: str = "") -> Loaded:
    return Loaded(name, f"{name}:plugin", f"{name}-dist 1.0", plugin=plugin, error=error)


def double(x: int) -> int:
    return 2 * x


def test_without_plugins_the_built_in_models_are_there() -> None:
    assert gather([]) == Extension(MODELS, ())


def test_a_plugin_adds_models_and_ops() -> None:
    op = Op("double", double)
    extension = gather([loaded(Extension({"NewForCausalLM": Decoder}, (op,)))])
    assert extension.models == {**MODELS, "NewForCausalLM": Decoder}
    assert extension.ops == (op,)


def test_a_plugin_that_fails_to_load_is_an_error_with_its_reason() -> None:
    with pytest.raises(PlatformError, match=r"plugin extra \(extra-dist 1.0\): .*ImportError: no such thing"):
        gather([loaded(error="ImportError: no such thing")])


def test_a_plugin_that_returns_something_else_is_an_error() -> None:
    with pytest.raises(PlatformError, match="extra:plugin returned dict, not Extension"):
        gather([loaded({})])


def test_a_built_in_architecture_cannot_be_replaced() -> None:
    with pytest.raises(PlatformError, match="the architecture LlamaForCausalLM is already provided"):
        gather([loaded(Extension({"LlamaForCausalLM": Decoder}))])


def test_two_plugins_cannot_bring_one_architecture() -> None:
    one, two = (loaded(Extension({"NewForCausalLM": Decoder}), name=n) for n in ("one", "two"))
    with pytest.raises(PlatformError, match=r"plugin two .*NewForCausalLM is already provided"):
        gather([one, two])


def test_a_built_in_op_cannot_be_replaced() -> None:
    with pytest.raises(PlatformError, match=r"plugin extra .*the op attention is already defined"):
        gather([loaded(Extension(ops=(Op("attention", double),)))])


def test_two_plugins_cannot_bring_one_op() -> None:
    one, two = (loaded(Extension(ops=(Op("double", double),)), name=n) for n in ("one", "two"))
    with pytest.raises(PlatformError, match=r"plugin two .*the op double is already defined"):
        gather([one, two])


PLUGIN = '''
from hotplug.core.models.decoder import Decoder
from hotplug.core.ops.registry import Op
from hotplug.plugins.extension import Extension

def soft_cap(logits, cap):
    """cap * tanh(logits / cap)"""
    return cap * (logits / cap).tanh()

class CappedDecoder(Decoder):
    def __init__(self, ctx, config):
        super().__init__(ctx, config)
        self.cap = ctx.bind("soft_cap", "soft_cap", vocab=config.vocab_size)

    def logits(self, hidden):
        return self.cap(super().logits(hidden), self.config.raw["cap"])

def plugin():
    return Extension({"CappedForCausalLM": CappedDecoder}, (Op("soft_cap", soft_cap, facts=("vocab",)),))
'''
GENERATE = """
import json, sys, torch
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.request import Request, SamplingParams
core = EngineCore(EngineConfig(model=sys.argv[1], load_format="dummy", device="cpu", kv_cache_memory="4MiB"))
params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
core.add(Request(id="r", prompt_token_ids=[1, 2, 3], sampling=params))
tokens = []
while core.has_work:
    tokens += [t for delta in core.step() for t in delta.token_ids]
sites = {s["site"]: s["provider"] for s in core.report()["sites"]}
capped = core.bound.model.logits(torch.full((1, core.bound.checkpoint.config.hidden_size), 1e4)).abs().max().item()
print(json.dumps({"tokens": tokens, "provider": sites["soft_cap"], "largest": capped}))
"""


def test_an_installed_plugin_runs_its_architecture_with_its_op(tiny_model: Path, tmp_path: Path) -> None:
    site, model = tmp_path / "site", tmp_path / "model"
    write_distribution(site, "capped", entry_points={"hotplug.plugins": {"capped": "capped:plugin"}},
                       modules={"capped.py": PLUGIN})  # fmt: skip
    model.mkdir()
    values = json.loads((tiny_model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, "architectures": ["CappedForCausalLM"], "cap": 0.5}))
    done = run_python(site, "-c", GENERATE, str(model))
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer["tokens"]) == 5
    assert answer["provider"] == "reference"
    assert 0.4 < answer["largest"] <= 0.5
