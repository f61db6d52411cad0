"""Matrices rearranged for their kernels at load (`HasWeights`): which, when, and what is let go of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_platforms import FakePlatform, candidates, limits
from gguf_files import HIDDEN, VOCAB, random_tensors, tensor_shapes, write_gguf
from torch import Tensor, nn

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.ops import packed_linear
from hotplug.core.ops.registry import Bucket, Impl, SiteSpec
from hotplug.core.request import Request, SamplingParams
from hotplug.core.startup import bind as bind_module
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


@dataclass
class Flips(FakePlatform):
    """Repacks by turning the order of rows around."""

    facts: Any = field(default_factory=lambda: limits(quantization=("none", "*"), accelerator=False))
    kernels: Any = (
        Impl("linear_packed", "acme", flipped),
        Impl("linear_packed_silu_mul", "acme", flipped_gated),
        Impl("logits_packed", "acme", flipped_scores),
    )
    asked: list[tuple[SiteSpec, str]] = field(default_factory=list)

    def repack(self, weight: Tensor, spec: SiteSpec, provider: str) -> Tensor:
        self.asked.append((spec, provider))
        return weight.flip(0)


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
        def repack(self, weight: Tensor, spec: SiteSpec, provider: str) -> Tensor:
            before.append(weight.untyped_storage()._weak_ref())
            return super().repack(weight, spec, provider)

    before: list[Any] = []
    core = start(Counts())
    alive = [ref for ref in before if not torch.UntypedStorage._expired(ref)]
    assert len(before) == 9
    assert len(alive) == 1  # the embedding's, which is the head's too
    assert core.bound.model.decoder.embed.weight.untyped_storage()._weak_ref() in alive


def test_a_site_that_another_kernel_serves_in_part_keeps_its_matrix(start) -> None:
    def few(bucket: Bucket) -> bool:
        return bucket.num_tokens < 3

    kernels = (
        Impl("linear_packed", "acme.few", as_packed, accepts=few, rank=5),
        Impl("linear_packed", "acme", as_packed),
    )
    platform = Flips(kernels=kernels)
    tokens(start(platform))
    assert platform.asked == []


@pytest.mark.parametrize("how", ["reference", "observed", "compiled"])
def test_matrices_stay_as_they_are_where_others_read_them(start, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    platform = Flips(kernels=(Impl("linear_packed", "acme", as_packed),))
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
    weight = nn.Parameter(torch.randn(4, HIDDEN), requires_grad=False)
    spec = SiteSpec("linear", "s", "float32", "avx2", {"scheme": "none"})
    assert CpuPlatform().repack(weight, spec, "cpu.native") is weight


def native_groups(scheme: str, rows: int) -> Any:
    from hotplug.core.quant.packed_scheme import PackedScheme

    return PackedScheme(scheme).quantize(torch.randn(rows, 96))
