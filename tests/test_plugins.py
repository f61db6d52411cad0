"""Plugins of the group `hotplug.plugins`: an architecture with an op of its own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from throwaway import run_python, write_distribution

import hotplug.plugins
from hotplug.core.config import EngineConfig
from hotplug.core.errors import ConfigError, PlatformError
from hotplug.core.extension.points import Extension
from hotplug.core.models.decoder import Decoder
from hotplug.core.models.families import MODELS
from hotplug.core.ops.registry import Op
from hotplug.core.platform.discovery import Loaded
from hotplug.core.scheduler.policy import FCFS, POLICIES
from hotplug.core.startup.bind import bind
from hotplug.core.startup.installed import gather
from hotplug.core.weights.hf_config import parse_hf_config


def loaded(plugin: object = None, *, name: str = "extra", error: str = "") -> Loaded:
    return Loaded(name, f"{name}:plugin", f"{name}-dist 1.0", plugin=plugin, error=error)


def double(x: int) -> int:
    return 2 * x


def policy(name: str = "quickest") -> Extension:
    return Extension(scheduling={name: FCFS})


def test_without_plugins_the_built_in_entries_are_there() -> None:
    extension = gather([])
    assert (extension.models, extension.scheduling, extension.ops) == (MODELS, POLICIES, ())
    assert set(extension.tool_parsers) == {"hermes"}
    assert set(extension.reasoning_parsers) == {"think"}


def test_a_plugin_adds_models_ops_and_policies() -> None:
    op = Op("double", double)
    brought = Extension(models={"NewForCausalLM": Decoder}, ops=(op,), scheduling={"quickest": FCFS})
    extension = gather([loaded(brought)])
    assert extension.models == {**MODELS, "NewForCausalLM": Decoder}
    assert extension.ops == (op,)
    assert extension.scheduling == {**POLICIES, "quickest": FCFS}


def test_a_plugin_that_fails_to_load_is_an_error_with_its_reason() -> None:
    with pytest.raises(PlatformError, match=r"plugin extra \(extra-dist 1.0\): .*ImportError: no such thing"):
        gather([loaded(error="ImportError: no such thing")])


def test_a_plugin_that_returns_something_else_is_an_error() -> None:
    with pytest.raises(PlatformError, match="extra:plugin returned dict, not Extension"):
        gather([loaded({})])


def test_a_config_reader_without_its_model_is_an_error() -> None:
    with pytest.raises(PlatformError, match="reads the config of OddForCausalLM, which is not among its models"):
        gather([loaded(Extension(config_readers={"OddForCausalLM": parse_hf_config}))])


@pytest.mark.parametrize(
    ("brought", "title"),
    [
        (Extension(models={"LlamaForCausalLM": Decoder}), "architecture LlamaForCausalLM"),
        (Extension(ops=(Op("attention", double),)), "op attention"),
        (policy("fcfs"), "scheduling policy fcfs"),
    ],
)
def test_what_is_built_in_cannot_be_replaced(brought: Extension, title: str) -> None:
    with pytest.raises(PlatformError, match=rf"(?s)the {title} is provided twice.*hotplug itself.*extra-dist 1.0"):
        gather([loaded(brought)])


@pytest.mark.parametrize(
    ("brought", "title"),
    [
        (Extension(models={"NewForCausalLM": Decoder}), "architecture NewForCausalLM"),
        (Extension(ops=(Op("double", double),)), "op double"),
        (policy(), "scheduling policy quickest"),
    ],
)
def test_two_packages_cannot_bring_one_name(brought: Extension, title: str) -> None:
    with pytest.raises(PlatformError, match=rf"(?s)the {title} is provided twice.*one-dist 1.0.*two-dist 1.0"):
        gather([loaded(brought, name="one"), loaded(brought, name="two")])


def test_an_unknown_name_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"(?s)--scheduling: there is no scheduling policy 'quikest'.*'quickest'"):
        gather([loaded(policy())]).find("scheduling", "quikest", option="--scheduling")


def test_an_unknown_scheduling_policy_is_refused_before_the_model_is_looked_for() -> None:
    with pytest.raises(ConfigError, match=r"no scheduling policy 'prioritty'.*'priority'"):
        bind(EngineConfig(model="/no/such/model", scheduling="prioritty"))


def test_every_name_of_the_plugin_interface_is_there() -> None:
    assert sorted(hotplug.plugins.__all__) == sorted(hotplug.plugins._MODULE_OF)
    assert [name for name in hotplug.plugins.__all__ if getattr(hotplug.plugins, name, None) is None] == []


PLUGIN = '''
from hotplug.plugins import Decoder, Extension, Op

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
    return Extension(models={"CappedForCausalLM": CappedDecoder}, ops=(Op("soft_cap", soft_cap, facts=("vocab",)),))
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
width = core.bound.checkpoint.config.hidden_size
capped = core.bound.model.decoder.logits(torch.full((1, width), 1e4)).abs().max().item()
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
