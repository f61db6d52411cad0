"""Weights that stay in the groups of their checkpoint: formats, layers, loading, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from fake_platforms import FakePlatform, candidates, limits
from gguf import GGMLQuantizationType as Kind
from gguf_files import HIDDEN, VOCAB, random_tensors, tensor_shapes, write_gguf

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import ConfigError, FeatureError, ModelError
from hotplug.core.layers.table import table_destination
from hotplug.core.ops.packed_linear import (
    GROUP_BYTES,
    dequantize,
    embed_packed,
    linear_packed,
    logits_packed,
    scheme_of,
)
from hotplug.core.quant.packed_scheme import PackedRows, PackedScheme
from hotplug.core.request import Request, SamplingParams
from hotplug.core.startup import bind as bind_module
from hotplug.core.weights.checkpoint import open_checkpoint
from hotplug.core.weights.packed_matrix import PackedMatrix
from hotplug.platforms.cpu import CpuPlatform

FORMATS = sorted(GROUP_BYTES)
DOWN, UP = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"


def groups(scheme: str, rows: int = 5, columns: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """A random matrix in groups, and its values by the gguf package."""
    weight = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    data = gguf.quants.quantize(weight, Kind[scheme.upper()])
    return torch.from_numpy(data), torch.from_numpy(gguf.quants.dequantize(data, Kind[scheme.upper()]))


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", FORMATS)
def test_groups_are_read_as_the_gguf_package_reads_them(scheme: str) -> None:
    data, values = groups(scheme)
    assert torch.equal(dequantize(data, scheme), values)
    assert scheme_of(data, 96) == scheme


def test_rows_of_no_format_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 21 bytes do not hold 32 weights"):
        scheme_of(torch.zeros(3, 21, dtype=torch.uint8), 32)


@pytest.mark.parametrize("scheme", FORMATS)
def test_a_scheme_keeps_what_it_can_hold(scheme: str) -> None:
    _, values = groups(scheme)
    ((shape, dtype),) = PackedScheme(scheme).tensors(5, 96).values()
    (data,) = PackedScheme(scheme).quantize(values)
    assert (tuple(data.shape), data.dtype) == (shape, dtype)
    assert torch.allclose(dequantize(data, scheme), values, atol=0.02)


@pytest.mark.parametrize("scheme", FORMATS)
def test_ops_are_those_of_the_dequantized_matrix(scheme: str) -> None:
    data, values = groups(scheme)
    x, bias = torch.randn(3, 96), torch.randn(5)
    assert torch.equal(linear_packed(x, data, bias), torch.nn.functional.linear(x, values, bias))
    assert logits_packed(x.bfloat16(), data, None).dtype is torch.float32
    ids = torch.tensor([4, 0, 4])
    assert torch.equal(embed_packed(ids, data, 96), values[ids])
    assert embed_packed(ids[:0], data, 96).shape == (0, 96)
    assert linear_packed(x[:0], data, bias).shape == (0, 5)


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineCore]:
    def make(path: Path, platform: FakePlatform | None = None, **options: Any) -> EngineCore:
        found = platform or FakePlatform(facts=limits(quantization=("none", "*"), accelerator=False))
        monkeypatch.setattr(bind_module, "discover", lambda: candidates(found))
        return EngineCore(EngineConfig(model=str(path), max_model_len=64, kv_cache_memory="4MiB", **options))

    return make


def model(folder: Path, quant: Kind | None, *, tied: bool = False, **options: Any) -> Path:
    shapes = tensor_shapes() | ({} if tied else {"output.weight": (VOCAB, HIDDEN)})
    return write_gguf(folder / "model.gguf", random_tensors(shapes), quant=quant, **options)


def tokens(core: EngineCore) -> list[int]:
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    core.add(Request(id="0", prompt_token_ids=[1, 5, 9, 2, 7], sampling=sampling))
    found: list[int] = []
    while core.has_work:
        for delta in core.step():
            found += delta.token_ids
    return found


@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("tied", [False, True])
def test_tokens_are_those_of_the_dequantized_model(start, tmp_path: Path, scheme: str, tied: bool) -> None:
    path = model(tmp_path, Kind[scheme.upper()], tied=tied)
    kept = start(path, quantization="packed")
    assert kept.report()["quantization"] == "packed"
    assert {p.dtype for p in kept.bound.model.decoder.parameters() if p.dim() == 2} == {torch.uint8}
    assert tokens(kept) == tokens(start(path))


@pytest.mark.parametrize(
    "others",
    [
        {"0.ffn_down": Kind.Q4_1, "1.attn_output": Kind.Q8_0},
        {"attn_output": Kind.Q4_0, "output.weight": Kind.Q8_0},
        {"attn_output": Kind.Q4_0, "output.weight": Kind.F16},
        {"token_embd": Kind.Q6_K},
        {"attn_": Kind.Q8_0, "token_embd": Kind.Q8_0},
    ],
)
@pytest.mark.parametrize("on_cpu", [False, True])
def test_each_matrix_is_kept_in_its_own_format(start, tmp_path: Path, others: dict[str, Kind], on_cpu: bool) -> None:
    path = model(tmp_path, Kind.Q4_0, others=others)
    platform = CpuPlatform() if on_cpu else None
    kept = start(path, platform, quantization="packed", dtype="float32")
    found = {site["site"]: site["facts"]["scheme"] for site in kept.report()["sites"] if "scheme" in site["facts"]}
    expected = {"embed": "token_embd", "logits": "output.weight", "layers.0.attn.qkv": "0.attn_q.weight",
                "layers.1.attn.out": "1.attn_output.weight", "layers.0.mlp.down": "0.ffn_down.weight"}  # fmt: skip
    for site, tensor in expected.items():
        kind = next((kind for part, kind in others.items() if part in tensor), Kind.Q4_0)
        name = kind.name.lower() if kind.name.lower() in GROUP_BYTES else "none"
        assert found.get(site, "none") == name  # an embedding in floating point has no scheme to state
    wanted = tokens(start(path, platform, quantization="none", dtype="float32"))
    if on_cpu:  # rounds activations to eight bits
        assert len(tokens(kept)) == len(wanted)
    else:
        assert tokens(kept) == wanted


def test_tables_in_floating_point_stay_so(start, tmp_path: Path) -> None:
    path = model(tmp_path, Kind.Q4_1, tied=True, others={"token_embd": Kind.F16})
    kept = start(path, quantization="packed")
    assert kept.bound.model.decoder.embed.weight.dtype is torch.float32
    assert tokens(kept) == tokens(start(path))


def test_only_what_is_kept_comes_in_groups(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model(tmp_path, Kind.Q8_0))
    assert checkpoint.formats[DOWN] == "q8_0"
    found = dict(checkpoint.tensors({DOWN}))
    assert isinstance(found[DOWN], PackedMatrix)
    assert found[DOWN].shape == found[UP].shape[::-1]
    assert isinstance(found[UP], torch.Tensor)
    plain = dict(checkpoint.tensors())[DOWN]
    assert torch.equal(dequantize(found[DOWN].data, "q8_0"), plain)


def test_what_is_dequantized_is_not_copied(start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, copied = model(tmp_path, Kind.Q4_1), []
    real = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *args: (copied.append(self.dim()), real(self, *args))[1])
    core = start(path)
    assert 2 not in copied  # matrices; norms come in floating point
    monkeypatch.undo()
    expected = dict(core.bound.checkpoint.tensors())["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(core.bound.model.decoder.layers[0].mlp.gate_up.weight[len(expected) :], expected)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quant", "others", "has"),
    [
        (None, {}, "f32"),
        (Kind.F16, {}, "f16"),
        (Kind.Q5_0, {}, "q5_0"),
        (Kind.Q8_0, {"ffn_down": Kind.F16}, "f16, q8_0"),
    ],
)
def test_files_with_layers_in_other_formats_are_refused(
    start, tmp_path: Path, quant: Kind | None, others: dict[str, Kind], has: str
) -> None:
    with pytest.raises(ConfigError, match=f"does not store its matrices(.|\n)*it has {has}"):
        start(model(tmp_path, quant, others=others), quantization="packed")


def test_matrices_of_several_formats_that_are_read_together_are_refused(start, tmp_path: Path) -> None:
    path = model(tmp_path, Kind.Q8_0, others={"1.ffn_up": Kind.Q4_0})
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.gate_up reads matrices in q4_0 and q8_0 together"):
        start(path, quantization="packed")


def test_a_checkpoint_without_groups_is_refused(start, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="it has floating point"):
        start(tiny_model, quantization="packed", load_format="dummy")


def test_a_platform_that_does_not_serve_it_is_refused(start, tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match="quantization packed is not among none"):
        start(model(tmp_path, Kind.Q8_0), FakePlatform(facts=limits(quantization=("none",))), quantization="packed")


def test_a_module_around_an_embedding_must_say_how_its_table_is_stored() -> None:
    wrapper = torch.nn.Module()
    wrapper.weight = torch.nn.Parameter(torch.zeros(4, 34, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match="its weight is in groups, and it does not say in which"):
        table_destination(wrapper, 32)
    wrapper.scheme = PackedScheme("q8_0")
    assert isinstance(table_destination(wrapper, 32), PackedRows)
    wrapper.scheme, wrapper.weight = None, torch.nn.Parameter(torch.zeros(4, 32))
    assert table_destination(wrapper, 32) is wrapper.weight
