"""Matrices rearranged for their kernels at load (`HasWeights`): which, when, and what is let go of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_platforms import FakePlatform, candidates, limits, loaded
from gguf_files import HIDDEN, VOCAB, random_tensors, tensor_shapes, write_gguf
from torch import Tensor, nn

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import PlatformError
from hotplug.core.extension.points import Extension
from hotplug.core.ops import dense, packed_linear
from hotplug.core.ops.registry import Bucket, Impl, Op, SiteSpec
from hotplug.core.request import Request, SamplingParams
from hotplug.core.startup import bind as bind_module
from hotplug.core.startup import installed
from hotplug.platforms.cpu import CpuPlatform
from hotplug.platforms.cpu.native import packed as native
from hotplug.platforms.cpu.native.library import refusal
from hotplug.vendor import ExecMode

PRODUCTS = ("linear_packed", "linear_packed_silu_mul", "logits_packed")


def flipped(x: Tensor, data: Tensor, bias: Tensor | None) -> Tensor:
    """Reads what `Flips` gives: rows last first."""
    return packed_linear.linear_packed(x, data.flip(0), bias)


def flipped_scores(x: Tensor, data: Tensor, bias: Tensor | None) -> Tensor:
    return flipped(x, data, bias)


def flipped_gated(x: Tensor, data: Tensor, bias: Tensor | None) -> Tensor:
    return packed_linear.linear_packed_silu_mul(x, data.flip(0), bias)


def as_packed(x: Tensor, data: Tensor, bias: Tensor | None) -> Tensor:
    return packed_linear.linear_packed(x, data, bias)


def as_gated(x: Tensor, data: Tensor, bias: Tensor | None) -> Tensor:
    return packed_linear.linear_packed_silu_mul(x, data, bias)


def flipped_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return dense.linear(x, weight.flip(0), bias)


def linear_halved(x: Tensor, halves: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return dense.linear(x, halves * scale, bias)


def flipped_halved(x: Tensor, halves: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return linear_halved(x, halves.flip(0), scale.flip(0), bias)


class Halved:
    """A scheme of two tensors: half of each weight, and what to multiply each row by."""

    op = Op("linear_halved", linear_halved, facts=("in_features", "out_features", "bias"))

    def tensors(self, out_features: int, in_features: int) -> Any:
        return {"halves": ((out_features, in_features), torch.float32), "scale": ((out_features, 1), torch.float32)}

    def quantize(self, weight: Tensor) -> Sequence[Tensor]:
        scale = 1 + torch.arange(len(weight)).unsqueeze(1) / len(weight)
        return [weight / scale, scale]


@dataclass
class Flips(FakePlatform):
    """Repacks by turning the order of rows around."""

    facts: Any = field(default_factory=lambda: limits(quantization=("none", "*"), accelerator=False))
    kernels: Any = (
        Impl("linear_packed", "acme", make=lambda _: flipped),
        Impl("linear_packed_silu_mul", "acme", make=lambda _: flipped_gated),
        Impl("logits_packed", "acme", make=lambda _: flipped_scores),
    )
    asked: list[tuple[SiteSpec, str]] = field(default_factory=list)

    def repack(self, weight: Sequence[Tensor], spec: SiteSpec, provider: str) -> Sequence[Tensor]:
        self.asked.append((spec, provider))
        return [tensor.flip(0) for tensor in weight]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineCore]:
    path = write_gguf(tmp_path / "model.gguf", random_tensors(tensor_shapes()), quant=gguf_kind("Q4_1"))

    def make(platform: Any, *, observe: Any = None, **options: Any) -> EngineCore:
        monkeypatch.setattr(bind_module, "discover", lambda: candidates(platform))
        options = {"quantization": "packed", "max_model_len": 64, "kv_cache_memory": "4MiB", **options}
        return EngineCore(EngineConfig(model=str(path), **options), observe=observe)

    return make


def gguf_kind(name: str) -> Any:
    import gguf

    return gguf.GGMLQuantizationType[name]


def tokens(core: EngineCore) -> list[int]:
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    core.add(Request(id="0", prompt_token_ids=[1, 5, 9, 2, 7], sampling=sampling))
    found: list[int] = []
    while core.has_work:
        for delta in core.step():
            found += delta.token_ids
    return found


def test_a_kernel_gets_its_matrices_as_the_platform_repacks_them(start) -> None:
    platform = Flips()
    core = start(platform)
    assert tokens(core) == tokens(start(FakePlatform(facts=platform.facts)))
    products = [s for s in core.report()["sites"] if s["op"] in PRODUCTS]
    assert sorted(spec.site for spec, _ in platform.asked) == sorted(s["site"] for s in products)
    assert {provider for _, provider in platform.asked} == {"acme"}


def test_an_embedding_keeps_the_groups_that_its_tied_head_gets_repacked(start) -> None:
    core = start(Flips())
    embed, head = core.bound.model.decoder.embed.weight, core.bound.model.decoder.head.weight
    assert embed is not head
    assert torch.equal(embed.flip(0), head)


def test_what_was_repacked_is_let_go_of(start) -> None:
    class Counts(Flips):
        def repack(self, weight: Sequence[Tensor], spec: SiteSpec, provider: str) -> Sequence[Tensor]:
            before.append(weight[0].untyped_storage()._weak_ref())
            return super().repack(weight, spec, provider)

    before: list[Any] = []
    core = start(Counts())
    alive = [ref for ref in before if not torch.UntypedStorage._expired(ref)]
    assert len(before) == 9
    assert len(alive) == 1  # the embedding's, which is the head's too
    assert core.bound.model.decoder.embed.weight.untyped_storage()._weak_ref() in alive


def test_the_matrix_of_a_lowered_op_is_repacked_for_the_part_that_reads_it(start) -> None:
    parts = (
        Impl("linear_packed", "acme", make=lambda _: flipped),
        Impl("silu_mul", "acme", make=lambda _: dense.silu_mul),
    )
    platform = Flips(kernels=parts)
    core = start(platform)
    assert tokens(core) == tokens(start(FakePlatform(facts=platform.facts)))
    gated = {spec.site: (spec.op, spec["out_features"]) for spec, _ in platform.asked if "gate_up" in spec.site}
    width = 2 * core.bound.model.decoder.layers[0].mlp.width
    assert gated == {f"layers.{i}.mlp.gate_up.linear": ("linear_packed", width) for i in range(2)}


def test_a_floating_point_matrix_of_a_lowered_op_is_repacked_too(start) -> None:
    platform = Flips(kernels=(Impl("linear", "acme", make=lambda _: flipped_linear),))
    found = tokens(start(platform, quantization="none"))
    assert found == tokens(start(FakePlatform(facts=platform.facts), quantization="none"))
    assert {spec.site for spec, _ in platform.asked} >= {"layers.0.mlp.gate_up.linear", "layers.1.attn.qkv"}


@pytest.mark.parametrize("other", ["fused", "part"])
def test_the_matrix_of_a_lowered_op_stays_where_several_kernels_read_it(start, other: str) -> None:
    def few(bucket: Bucket) -> bool:
        return bucket.num_tokens < 3

    beside = {
        "fused": Impl("linear_packed_silu_mul", "acme.few", make=lambda _: as_gated, accepts=few),
        "part": Impl("linear_packed", "acme.few", make=lambda _: as_packed, accepts=few, rank=5),
    }
    platform = Flips(kernels=(Impl("linear_packed", "acme", make=lambda _: as_packed), beside[other]))
    monkey = start(FakePlatform(facts=platform.facts))
    platform.repack = lambda weight, spec, provider: platform.asked.append((spec, provider)) or weight
    assert tokens(start(platform)) == tokens(monkey)
    assert not [spec for spec, _ in platform.asked if "gate_up" in spec.site]


def test_a_weight_of_several_tensors_is_repacked_as_a_whole(start, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = Extension(quantization={"halved": Halved()})
    monkeypatch.setattr(installed, "load_group", lambda group: [loaded(extension)])
    platform = Flips(kernels=(Impl("linear_halved", "acme", make=lambda _: flipped_halved),))
    core = start(platform, quantization="halved")
    assert tokens(core) == tokens(start(FakePlatform(facts=platform.facts), quantization="halved"))
    stored = core.bound.model.decoder.layers[0].attn.qkv.stored
    assert [tuple(t.shape[1:]) for t in stored] == [(HIDDEN,), (1,)]
    assert {spec.op for spec, _ in platform.asked} == {"linear_halved"}


def test_a_weight_that_comes_back_with_fewer_tensors_is_an_error(start, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = Flips()
    monkeypatch.setattr(Flips, "repack", lambda self, weight, spec, provider: [])
    with pytest.raises(PlatformError, match=r"acme at .*: repack gives something else than the 1 tensors of a weight"):
        start(platform)


def test_a_site_that_another_kernel_serves_in_part_keeps_its_matrix(start) -> None:
    def few(bucket: Bucket) -> bool:
        return bucket.num_tokens < 3

    kernels = (
        Impl("linear_packed", "acme.few", make=lambda _: as_packed, accepts=few, rank=5),
        Impl("linear_packed", "acme", make=lambda _: as_packed),
    )
    platform = Flips(kernels=kernels)
    tokens(start(platform))
    assert platform.asked == []


@pytest.mark.parametrize("how", ["reference", "observed", "compiled"])
def test_matrices_stay_as_they_are_where_others_read_them(start, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    platform = Flips(kernels=(Impl("linear_packed", "acme", make=lambda _: as_packed),))
    if how == "reference":
        core = start(platform, force=("linear_packed=reference",))
    elif how == "observed":
        core = start(platform, observe=lambda op, spec, provider, fn: fn)
    else:
        monkeypatch.setattr(Flips, "buckets", lambda self, tokens, seqs: [(seqs, seqs), (tokens, seqs)], raising=False)
        for name in ("fingerprint", "num_compiled"):
            monkeypatch.setattr(Flips, name, lambda self: 0, raising=False)
        monkeypatch.setattr(Flips, "compile", lambda *_: None, raising=False)
        monkeypatch.setattr("hotplug.core.startup.start.make_executable", lambda *_: None)
        modes = (ExecMode.COMPILE, ExecMode.EAGER)
        platform.facts = limits(quantization=("none", "*"), accelerator=False, exec_modes=modes)
        core = start(platform, max_num_seqs=4)
    assert platform.asked == []
    assert {p.dtype for p in core.bound.model.decoder.parameters() if p.dim() == 2} == {torch.uint8}


def test_a_matrix_that_no_other_is_stacked_with_is_a_view_of_the_file(start) -> None:
    core = start(FakePlatform(facts=limits(quantization=("none", "*"), accelerator=False)))
    layer = core.bound.model.decoder.layers[0]
    weights = {
        "model.embed_tokens.weight": core.bound.model.decoder.embed.weight,
        "model.layers.0.mlp.down_proj.weight": layer.mlp.down.stored[0],
        "model.layers.0.self_attn.o_proj.weight": layer.attn.out.stored[0],
        "model.layers.0.mlp.gate_proj.weight": layer.mlp.gate_up.weight,
    }
    found = dict(core.bound.checkpoint.tensors(weights.keys()))
    same = {name: found[name].data.data_ptr() == weight.data_ptr() for name, weight in weights.items()}
    assert list(same.values()) == [True, True, True, False]


def test_views_of_a_file_stay_good_when_its_memory_is_given_back(start) -> None:
    core = start(FakePlatform(facts=limits(quantization=("none", "*"), accelerator=False)))
    weight = core.bound.model.decoder.embed.weight
    before = weight.clone()
    core.bound.checkpoint.release()
    assert torch.equal(weight, before)


# --- the CPU platform -----------------------------------------------------------------------------

needs_native = pytest.mark.skipif(refusal() is not None, reason=str(refusal()))


@needs_native
@pytest.mark.parametrize("scheme", sorted(packed_linear.GROUP_BYTES))
def test_packed_at_load_is_packed_at_first_use(scheme: str) -> None:
    (data,) = native_groups(scheme, 48)
    x, bias = torch.randn(3, 96), torch.randn(48)
    packed = native.repack(data, scheme)
    assert (packed.ndim, packed.nbytes) == (3, data.nbytes)
    assert torch.equal(native.linear_packed(x, packed, bias), native.linear_packed(x, data, bias))
    with pytest.raises(ValueError, match="do not hold 96 weights"):
        packed_linear.linear_packed(x, packed, bias)  # a reference does not take them for groups


@needs_native
def test_outputs_that_do_not_fill_tiles_stay_in_groups() -> None:
    (data,) = native_groups("q4_0", 47)
    assert native.repack(data, "q4_0") is data


@needs_native
def test_the_cpu_platform_keeps_no_second_copy(start) -> None:
    core = start(CpuPlatform(), dtype="float32")
    layer = core.bound.model.decoder.layers[0]
    products = [linear.stored[0] for linear in (layer.attn.qkv, layer.attn.out, layer.mlp.down)]
    assert all(weight.ndim == 3 for weight in (*products, layer.mlp.gate_up.weight))
    assert core.bound.model.decoder.head.weight.ndim == 3
    assert core.bound.model.decoder.embed.weight.shape[0] == VOCAB
    tokens(core)
    assert len(native._packed) == 0


def test_the_cpu_platform_leaves_what_it_has_no_layout_for() -> None:
    weight = [nn.Parameter(torch.randn(4, HIDDEN), requires_grad=False)]
    spec = SiteSpec("linear", "s", "float32", "avx2", {"scheme": "none"})
    assert CpuPlatform().repack(weight, spec, "cpu.native") is weight


def native_groups(scheme: str, rows: int) -> Any:
    from hotplug.core.quant.packed_scheme import PackedScheme

    return PackedScheme(scheme).quantize(torch.randn(rows, 96))
