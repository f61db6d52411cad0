"""Tracing and the plan's cost: what is timed, and that nothing of it exists in an untraced step."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
import torch
from fake_platforms import FakePlatform, candidates
from kv_groups import groups_of
from typer.testing import CliRunner

from hotplug.cli.main import app
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import ConfigError
from hotplug.core.layers.context import BuildContext
from hotplug.core.models.families import MODELS
from hotplug.core.models.loader import build_model
from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.norm import rms_norm
from hotplug.core.ops.plan import Plan
from hotplug.core.ops.registry import Impl, OpRegistry
from hotplug.core.request import Request, SamplingParams
from hotplug.core.startup import bind as bind_module
from hotplug.core.weights.config import ModelConfig, RopeConfig
from hotplug.platforms.cpu.kernels import KERNELS

PLAN_BAR = 0.2
"""Seconds to plan a model of 32 layers."""


@pytest.fixture
def core(tiny_model, monkeypatch) -> Any:
    monkeypatch.setattr(bind_module, "discover", lambda: candidates(FakePlatform(kernels=[KERNEL])))

    def make(**options: Any) -> EngineCore:
        return EngineCore(EngineConfig(model=str(tiny_model), load_format="dummy", max_model_len=128, max_num_seqs=4,
                                       kv_cache_memory="4MiB", **options))  # fmt: skip

    return make


def kernel(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, weight, 1e-5)


KERNEL = Impl("rms_norm", "acme", make=lambda _: kernel)


def generate(core: EngineCore, count: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    core.add(Request(id=f"r{count}", prompt_token_ids=[5, 6, 7], sampling=params))
    while core.has_work:
        core.step()


def test_a_trace_counts_every_call_by_site_and_kernel(core):
    engine = core(trace_ops=True)
    generate(engine, 5)
    trace = engine.trace()
    assert trace["steps"] == 5
    sites = {(s["site"], s["provider"]): s for s in trace["sites"]}
    norm = sites["layers.1.mlp_norm.norm", "acme"]
    assert norm["calls"] == 5
    assert norm["last_inputs"] == ["float32[1, 32]", "float32[32]"]
    assert norm["last_outputs"] == ["float32[1, 32]"]
    by_op = {(e["op"], e["provider"]): e for e in trace["ops"]}
    assert by_op["rms_norm", "acme"]["sites"] == 5
    assert sum(e["share"] for e in trace["ops"]) == pytest.approx(1.0, abs=0.01)
    assert engine.report()["trace"]["steps"] == 5


def test_a_lowered_op_is_not_charged_with_its_parts(core, monkeypatch):
    def slow(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        until = time.perf_counter() + 0.002
        while time.perf_counter() < until:
            pass
        return rms_norm(x, weight, 1e-5)

    platform = FakePlatform(kernels=[Impl("rms_norm", "acme", make=lambda _: slow)])
    monkeypatch.setattr(bind_module, "discover", lambda: candidates(platform))
    engine = core(trace_ops=True)
    generate(engine, 5)
    ops = {(e["op"], e["provider"]): e["median_us"] for e in engine.trace()["ops"]}
    assert ops["rms_norm", "acme"] > 2000
    assert ops["add_rms_norm", "composed"] < 1500


def test_without_tracing_the_kernel_itself_is_bound(core):
    engine = core()
    assert engine.bound.model.decoder.layers[0].attn_norm.op is kernel
    with pytest.raises(ConfigError, match="ops are not traced"):
        engine.trace()


def test_tracing_steps_that_run_as_a_whole_is_refused():
    with pytest.raises(ConfigError, match="trace_ops cannot go with exec capture"):
        EngineConfig(model="m", trace_ops=True, exec="capture")


def test_run_prints_the_trace_and_writes_it_by_site(tiny_model, tmp_path):
    file = tmp_path / "trace.json"
    args = ["run", str(tiny_model), "hello", "--load-format", "dummy", "--max-tokens", "3", "--kv-cache-memory", "4MiB"]
    result = CliRunner().invoke(app, [*args, "--trace-ops", "--trace-json", str(file)])
    assert result.exit_code == 0, result.output
    assert re.search(r"^rms_norm +cpu\.(native|fused) ", result.stderr, re.MULTILINE)
    assert json.loads(file.read_text())["steps"] == 3


def test_trace_json_without_tracing_is_refused(tiny_model, tmp_path):
    result = CliRunner().invoke(app, ["run", str(tiny_model), "hello", "--trace-json", str(tmp_path / "t.json")])
    assert result.exit_code == 2
    assert "Add --trace-ops" in result.stderr


# --- what a plan costs ----------------------------------------------------------------------------


def test_a_thousand_steps_look_nothing_up(core, monkeypatch):
    engine = core()
    looked_up = []
    for name in ("op", "impls"):
        monkeypatch.setattr(OpRegistry, name, lambda self, *a: looked_up.append(a))
    monkeypatch.setattr(Plan, "bind", lambda self, *a, **k: looked_up.append(a))
    for _ in range(10):
        generate(engine, 100)
    assert engine.stats().steps >= 1000
    assert not looked_up


def test_planning_a_model_of_32_layers_is_quick(capsys):
    config = ModelConfig(architecture="LlamaForCausalLM", vocab_size=1000, hidden_size=64, intermediate_size=128,
                         num_layers=32, num_heads=4, num_kv_heads=2, head_dim=16, max_position=64, rms_norm_eps=1e-5,
                         rope=RopeConfig(theta=1e4), dtype="float32")  # fmt: skip
    registry = builtin_registry()
    for impl in KERNELS:
        registry.add(impl)
    taken = []
    for _ in range(3):
        plan = Plan(registry, arch="avx2")
        begin = time.perf_counter()
        groups = groups_of(MODELS[config.architecture].kv_specs(config), 16)
        context = BuildContext(plan=plan, dtype=torch.float32, device=torch.device("meta"), kv=groups, max_position=64)
        build_model(config, context)
        plan.finish()
        taken.append(time.perf_counter() - begin)
    with capsys.disabled():
        print(f"\nplanned {len(plan.choices)} sites of 32 layers in {min(taken) * 1000:.0f} ms")
    assert min(taken) < PLAN_BAR
