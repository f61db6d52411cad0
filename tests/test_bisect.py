"""`hotplug bisect`: the first call site whose kernel leaves its reference, and whether it explains the tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_platforms import FakePlatform, candidates, limits
from typer.testing import CliRunner

from hotplug.cli.main import app
from hotplug.core.config import EngineConfig
from hotplug.core.errors import HotplugError
from hotplug.core.ops.attention import kv_write
from hotplug.core.ops.compare import compare
from hotplug.core.ops.dense import linear
from hotplug.core.ops.norm import rms_norm
from hotplug.core.ops.registry import Impl, SiteSpec, Verdict
from hotplug.core.platform.base import ExecMode
from hotplug.core.startup import bind as bind_module
from hotplug.core.tools.bisect import bisect

PROMPT = list(range(3, 40))


def at(site: str) -> Any:
    def check(spec: SiteSpec) -> Verdict:
        return Verdict(spec.site == site, f"not {site}")

    return check


def scaled(x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
    return linear(x, weight, bias) * 3


def shifted(spec: SiteSpec) -> Any:
    return lambda k, v, k_cache, v_cache, slots: kv_write(k, v, k_cache, v_cache, slots + 1, spec["layout"])


def right_norm(spec: SiteSpec) -> Any:
    return lambda x, weight: rms_norm(x, weight, spec["eps"])


@pytest.fixture
def run(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def judge(*kernels: Impl, platform: Any = None) -> Any:
        trusted = FakePlatform(name="trusted")
        judged = platform or FakePlatform(kernels=kernels)
        monkeypatch.setattr(bind_module, "discover", lambda: candidates(trusted, judged))
        config = EngineConfig(model=str(tiny_model), load_format="dummy", device="acme")
        return bisect(config, PROMPT, reference="trusted", max_tokens=4)

    return judge


def test_right_kernels_are_acquitted(run):
    found = run(Impl("rms_norm", "acme", make=right_norm), Impl("linear", "acme", make=lambda _: lambda *a: linear(*a)))
    assert found.divergent == []
    assert found.tokens == found.expected
    assert found.compared > 0
    composed = {"add_rms_norm", "linear_silu_mul", "rope_kv_write", "prepare_step"}
    assert {s.op for s in found.sites} == {"rms_norm", "linear"} | composed


def test_one_wrong_site_is_named_with_its_worst_element(run):
    found = run(Impl("linear", "acme.scaled", make=lambda _: scaled, check=at("layers.0.mlp.down")))
    (site,) = found.divergent
    assert (site.site, site.provider, site.what, site.step) == ("layers.0.mlp.down", "acme.scaled", "output", 1)
    assert site.wrong_calls == site.calls
    assert "instead of" in site.comparison.reason
    assert site.inputs == ["float32[37, 64]", "float32[32, 64]"]


def test_what_a_kernel_left_in_its_arguments_is_judged(run):
    found = run(Impl("kv_write", "acme", make=shifted))
    assert found.divergent[0].site == "layers.0.attn.write.kv_write"
    assert {s.op for s in found.divergent} == {"kv_write"}


def test_the_reference_in_its_place_shows_whether_it_explains_the_tokens(run):
    def negated(*args: Any) -> torch.Tensor:
        return linear(*args) * -1000

    found = run(Impl("linear", "acme.negated", make=lambda _: negated, check=at("layers.0.mlp.down")))
    assert found.tokens != found.expected
    assert found.repaired_by_first is True


def test_a_part_of_a_fused_op_is_blamed_and_not_the_whole(run):
    def wrong(spec: SiteSpec) -> Any:
        return lambda x, weight: rms_norm(x, weight, spec["eps"]) + 1

    found = run(Impl("rms_norm", "acme", make=wrong, check=at("layers.1.mlp_norm.norm")))
    assert [s.site for s in found.divergent] == ["layers.1.mlp_norm.norm"]


def test_a_kernel_that_raises_is_named(run):
    def broken(*args: Any) -> Any:
        raise RuntimeError("bad launch")

    with pytest.raises(HotplugError, match=r"layers\.0\.mlp\.gate_up\.act: kernel acme of silu_mul raised.*bad launch"):
        run(Impl("silu_mul", "acme", make=lambda _: broken))


def test_a_wrong_replay_shows_in_the_tokens_of_its_own_mode(run):
    class Stale(FakePlatform):
        def capture(self, step: Any, device: Any) -> Any:
            step()
            return lambda: None

    facts = limits(exec_modes=(ExecMode.CAPTURE, ExecMode.EAGER), accelerator=False)
    found = run(platform=Stale(facts=facts))
    assert found.divergent == []
    assert found.tokens == found.expected
    assert found.exec_mode == "capture"
    assert found.whole != found.expected


def test_the_command_prints_the_culprit_and_exits_1(tiny_model, monkeypatch):
    judged = FakePlatform(kernels=[Impl("linear", "acme.scaled", make=lambda _: scaled, check=at("layers.0.mlp.down"))])
    monkeypatch.setattr(bind_module, "discover", lambda: candidates(FakePlatform(name="trusted"), judged))
    args = [
        "bisect",
        str(tiny_model),
        "hello",
        "--platform",
        "acme",
        "--reference",
        "trusted",
        "--load-format",
        "dummy",
    ]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 1, result.output
    assert "first divergence: layers.0.mlp.down (linear -> acme.scaled)" in result.stdout
    document = json.loads(CliRunner().invoke(app, [*args, "--json"]).stdout)
    assert document["sites"][0]["site"] == "layers.0.mlp.down"


# --- comparing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actual", "expected", "reason"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), "shape"),
        (torch.ones(2), torch.ones(2, dtype=torch.float16), "float32"),
        (torch.tensor([1.0, float("nan")]), torch.ones(2), r"worst at \[1\]: nan instead of 1"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "2 instead of 3"),
    ],
)
def test_what_differs_is_said_in_words(actual, expected, reason):
    found = compare(actual, expected)
    assert not found.ok
    assert re.search(reason, found.reason), found.reason


def test_a_near_zero_element_may_be_off_by_its_rows_size():
    row = torch.tensor([[100.0, 0.0]])
    assert compare(row + torch.tensor([[0.0, 1e-3]]), row).ok
    assert not compare(row + torch.tensor([[0.0, 1.0]]), row).ok
