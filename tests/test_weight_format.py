"""The format that weights are kept in where nobody asks for one: the platform's preference, its kernels, the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_platforms import FakePlatform, candidates, limits
from gguf import GGMLQuantizationType as Kind
from gguf_files import HIDDEN, VOCAB, random_tensors, tensor_shapes, write_gguf

from hotplug.core.config import EngineConfig
from hotplug.core.ops import packed_linear
from hotplug.core.ops.registry import Impl, SiteSpec, Verdict
from hotplug.core.startup.bind import Bound, bind
from hotplug.platforms.cpu import CpuPlatform

PREFERRED = limits(quantization=("packed", "none", "*"), accelerator=False)


def linear(x: Any, data: Any, bias: Any) -> Any:
    return packed_linear.linear_packed(x, data, bias)


def four_bits_only(spec: SiteSpec) -> Verdict:
    return Verdict(spec["scheme"].startswith("q4"), f"cannot read {spec['scheme']}")


def broken(spec: SiteSpec) -> Verdict:
    raise KeyError("rows")


def kernels(check: Any = lambda _: Verdict(True), *, logits: Any = None) -> tuple[Impl, ...]:
    return (
        Impl("linear_packed", "acme", make=lambda _: linear, check=check),
        Impl("logits_packed", "acme", make=lambda _: linear, check=logits or check),
    )


def bound(folder: Path, platform: Any, quant: Kind | None = Kind.Q4_0, others: Any = None, **options: Any) -> Bound:
    shapes = tensor_shapes() | {"output.weight": (VOCAB, HIDDEN)}
    path = write_gguf(folder / "model.gguf", random_tensors(shapes), quant=quant, others=others)
    return bind(EngineConfig(model=str(path), **options), meta=True, candidates=candidates(platform))


def format_of(found: Bound) -> tuple[str, str]:
    report = found.report()
    ops = {site["op"] for site in report["sites"]}
    assert ("linear_packed" in ops) is (report["quantization"] == "packed")
    return report["quantization"], report["quantization_because"]


def test_groups_are_kept_where_the_platform_prefers_it_and_its_kernels_read_them(tmp_path: Path) -> None:
    platform = FakePlatform(facts=PREFERRED, kernels=kernels())
    tables = {"attn_output": Kind.Q4_0, "token_embd": Kind.Q8_0, "output.weight": Kind.Q8_0}
    assert format_of(bound(tmp_path, platform, others=tables)) == (
        "packed",
        "the platform's kernels read q4_0 and q8_0 as stored",
    )


def test_a_platform_that_does_not_say_so_serves_floating_point(tmp_path: Path) -> None:
    platform = FakePlatform(facts=limits(quantization=("none", "packed")), kernels=kernels())
    name, reason = format_of(bound(tmp_path, platform))
    assert (name, "unless asked" in reason) == ("none", True)


def test_what_is_asked_for_wins(tmp_path: Path) -> None:
    preferring = FakePlatform(facts=PREFERRED, kernels=kernels())
    other = FakePlatform(facts=limits(quantization=("none", "*"), accelerator=False))
    assert format_of(bound(tmp_path, preferring, quantization="none")) == ("none", "asked for")
    assert format_of(bound(tmp_path, other, quantization="packed")) == ("packed", "asked for")


@pytest.mark.parametrize(
    ("platform", "reason"),
    [
        (FakePlatform(facts=PREFERRED), "no kernel of the platform serves linear_packed; no kernel of the platform"),
        (FakePlatform(facts=PREFERRED, kernels=kernels(four_bits_only)), "cannot read q8_0 (acme)"),
        (FakePlatform(facts=PREFERRED, kernels=kernels(logits=four_bits_only)), "cannot read q8_0 (acme)"),
        (FakePlatform(facts=PREFERRED, kernels=kernels(broken)), "failed in its check: KeyError: 'rows' (acme)"),
    ],
)
def test_without_a_kernel_for_it_it_is_floating_point_and_said_why(tmp_path: Path, platform: Any, reason: str) -> None:
    name, why = format_of(bound(tmp_path, platform, Kind.Q8_0))
    assert name == "none"
    assert why.startswith(reason)


@pytest.mark.parametrize(
    ("quant", "others", "has"),
    [(Kind.F16, {}, "f16"), (Kind.Q5_0, {}, "q5_0"), (Kind.Q8_0, {"ffn_down": Kind.F16}, "f16, q8_0")],
)
def test_a_file_that_cannot_be_kept_is_dequantized_and_said_why(
    tmp_path: Path, quant: Kind, others: dict[str, Kind], has: str
) -> None:
    platform = FakePlatform(facts=PREFERRED, kernels=kernels())
    name, reason = format_of(bound(tmp_path, platform, quant, others))
    assert (name, reason) == (
        "none",
        f"the checkpoint does not store its matrices in q4_0, q4_1, q8_0: it has {has}",
    )


def test_random_weights_are_floating_point(tmp_path: Path) -> None:
    platform = FakePlatform(facts=PREFERRED, kernels=kernels())
    name, reason = format_of(bound(tmp_path, platform, load_format="dummy"))
    assert (name, reason.endswith("it has floating point")) == ("none", True)


def test_a_dtype_that_the_kernels_do_not_take_is_served_from_floating_point(tmp_path: Path) -> None:
    name, reason = format_of(bound(tmp_path, CpuPlatform(), dtype="bfloat16"))
    assert (name, reason) == ("none", "takes activations in float32, not bfloat16 (cpu.native)")
