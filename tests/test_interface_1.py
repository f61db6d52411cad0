"""The adapter of interface 1.x: kernels called with constants, one tensor repacked, names as they were."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import make_case
from fake_platforms import FakePlatform, candidates, limits
from gguf_files import random_tensors, tensor_shapes, write_gguf
from test_repack import gguf_kind, tokens

from hotplug import vendor
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import PlanError
from hotplug.core.interface_1 import register, repacker
from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.plan import Plan
from hotplug.core.ops.reference import parameters
from hotplug.core.ops.registry import SiteSpec
from hotplug.core.platform.base import CompileLimits, Limits
from hotplug.core.platform.optional import HasWeights

WHEEL = Path(__file__).parent / "data" / "toy_kernels-1.1.0-py3-none-any.whl"
VENDOR: Any = vendor
SIGNATURES = {
    "rms_norm": "x weight eps",
    "add_rms_norm": "x residual weight eps",
    "all_reduce_add_norm": "x residual weight eps",
    "qk_norm_rope": "q k q_weight k_weight eps positions cos_sin",
    "kv_write": "k v k_cache v_cache slots layout",
    "rope_kv_write": "q k v positions cos_sin k_cache v_cache slots layout",
    "qk_norm_rope_kv_write": "q k v q_weight k_weight eps positions cos_sin k_cache v_cache slots layout",
    "attention": "q k_cache v_cache step scale window layout sinks soft_cap",
    "moe_route": "x weight top_k renormalize",
    "prepare_inputs": "token_ids rows query_start start last_tokens block_tables block_size",
    "prepare_step": "token_ids rows query_start start last_tokens block_tables block_size num_blocks",
    "embed_packed": "token_ids data hidden",
}
"""What kernels of 1.1 took, in this order, of the ops that have static parameters."""


@dataclass
class Old(FakePlatform):
    """A platform of 1.1; its kernels are what `vendor.Impl` made."""

    api_version: str = "1.1"
    kernels: Any = ()


def bound(kernel: Any, op: str = "rms_norm", **facts: Any) -> Any:
    registry = builtin_registry()
    register(Old(kernels=[kernel]), registry)
    plan = Plan(registry, arch="v1")
    fn = plan.bind(op, "a", "float32", **(facts or {"width": 8, "eps": 0.5}))
    plan.finish()
    return fn


def arguments(*args: Any) -> tuple[Any, ...]:
    return args


@pytest.mark.parametrize("op", SIGNATURES)
def test_a_kernel_is_called_with_all_parameters_in_the_order_of_1_1(op: str) -> None:
    assert " ".join(parameters(builtin_registry().op(op))) == SIGNATURES[op]


@pytest.mark.parametrize(
    "kernel",
    [
        VENDOR.Impl("rms_norm", "acme", arguments),
        VENDOR.Impl("rms_norm", "acme", fn=arguments, tags=frozenset({"graph-safe"})),
        VENDOR.Impl("rms_norm", "acme", arguments, lambda spec: vendor.Verdict(spec["width"] == 8, "8 only"), None, 3),
    ],
    ids=["positional", "keyword", "with a check and a rank"],
)
def test_constants_are_put_in_their_places(kernel: Any) -> None:
    assert bound(kernel)("x", "weight") == ("x", "weight", 0.5)


def test_a_kernel_without_constants_is_bound_itself() -> None:
    assert bound(VENDOR.Impl("silu_mul", "acme", arguments), "silu_mul", width=4) is arguments


ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "scale": 0.5, "window": 3, "static": False,
             "block_size": 4, "layout": "NHD", "kv_dtype": "float32"}  # fmt: skip


def test_sinks_and_soft_cap_are_passed_where_a_model_has_one() -> None:
    case = make_case([(1, 5)])
    kernel = VENDOR.Impl("attention", "acme", arguments)
    plain = bound(kernel, "attention", sinks=False, soft_cap=None, **ATTENTION)
    capped = bound(kernel, "attention", sinks=False, soft_cap=2.0, **ATTENTION)
    assert plain(case.q, case.k_cache, case.v_cache, case.step, None)[4:] == (0.5, 3, "NHD")
    assert capped(case.q, case.k_cache, case.v_cache, case.step, None)[4:] == (0.5, 3, "NHD", None, 2.0)


def test_what_a_kernel_keeps_of_a_step_is_there_for_the_next_layer_and_not_for_the_next_step() -> None:
    found: list[Any] = []

    def kernel(q: Any, k_cache: Any, v_cache: Any, step: Any, *_: Any) -> None:
        found.append(step.prepared)
        step.prepared = "prepared"

    fn = bound(VENDOR.Impl("attention", "acme", kernel), "attention", sinks=False, soft_cap=None, **ATTENTION)
    for case in (make_case([(1, 5)]), make_case([(1, 6)])):
        for _ in range(2):
            fn(case.q, case.k_cache, case.v_cache, case.step, None)
    assert found == [None, "prepared"] * 2


def test_ops_have_the_names_of_1_1_too() -> None:
    asked: list[str] = []

    def check(spec: SiteSpec) -> vendor.Verdict:
        asked.append(spec.op)
        return vendor.Verdict(True)

    class Looks(Old):
        def register(self, ops: Any) -> None:
            assert "linear_stored" in ops.names and "linear" in ops.names
            assert ops.op("linear_stored").name == "linear_packed"
            super().register(ops)

    registry = builtin_registry()
    register(Looks(kernels=[VENDOR.Impl("linear_stored", "acme", arguments, check=check)]), registry)
    plan = Plan(registry, arch="v1")
    plan.bind("linear_packed", "a", "float32", in_features=32, out_features=8, bias=False, scheme="q8_0")
    assert [choice.provider for choice in plan.choices] == ["acme"]
    assert asked == ["linear_stored"]


def test_limits_take_what_1_1_had() -> None:
    assert VENDOR.Limits(dtypes=("float32",), alignment=8, quantization=("stored", "none")) == Limits(
        dtypes=("float32",), quantization=("packed", "none")
    )
    assert VENDOR.CompileLimits(quantization=("stored",)) == CompileLimits(quantization=("packed",))


def test_the_protocols_still_import_one_by_one() -> None:
    assert VENDOR.HasWeights is HasWeights is vendor.optional.HasWeights
    assert not [name for name in vendor.__all__ if name.startswith("Has")]
    with pytest.raises(AttributeError, match="has no attribute 'HasNothing'"):
        VENDOR.HasNothing  # noqa: B018


def test_a_kernel_of_2_0_from_a_platform_that_does_not_say_so_is_refused() -> None:
    with pytest.raises(PlanError, match=r'kernel acme of rms_norm: it has a make=.*api_version = "2.0"'):
        register(Old(kernels=[VENDOR.Impl("rms_norm", "acme", make=lambda _: arguments)]), builtin_registry())


def test_repack_of_one_tensor_is_not_asked_about_several() -> None:
    class Turns(Old):
        def repack(self, weight: Any, spec: SiteSpec, provider: str) -> Any:
            return weight.flip(0)

    repack: Any = repacker(Turns())  # type: ignore[arg-type]
    spec = SiteSpec("linear", "a", "float32", "v1", {})
    one, two = torch.arange(3), torch.arange(4)
    assert [x.tolist() for x in repack([one], spec, "acme")] == [[2, 1, 0]]
    assert repack([one, two], spec, "acme") == [one, two]


# --- a wheel of 1.1 -------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package of the wheel, imported."""
    with zipfile.ZipFile(WHEEL) as wheel:
        wheel.extractall(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import toy_kernels  # type: ignore[import-not-found]

    yield toy_kernels
    for name in ("toy_kernels", "toy_kernels.kernels"):
        sys.modules.pop(name, None)


def test_a_wheel_of_1_1_reads_packed_weights_as_it_repacked_them(package: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_tensors(tensor_shapes()), quant=gguf_kind("Q4_1"))

    def start(platform: Any) -> EngineCore:
        config = EngineConfig(model=str(path), quantization="packed", max_model_len=64, kv_cache_memory="4MiB")
        return EngineCore(config, candidates=candidates(platform))

    platform = package.ToyKernels()
    core = start(platform)
    facts = limits(quantization=("none", "*"), accelerator=False)
    found = tokens(core)
    assert found == tokens(start(FakePlatform(facts=facts)))
    assert core.bound.model.decoder.layers[0].attn.qkv.stored[0].ndim == 3
    assert core.bound.model.decoder.layers[0].mlp.gate_up.weight.ndim == 3  # of a lowered op
    from toy_kernels.kernels import PREPARED  # type: ignore[import-not-found]

    assert len(PREPARED) >= len(found) and len(set(map(id, PREPARED))) == len(PREPARED)
