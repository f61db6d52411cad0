"""Mixture-of-experts models beyond their logits: checkpoints in both forms, refusals, and a whole engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from kv_groups import one_group
from model_runs import ModelRun
from safetensors.torch import load_file, save_file

from hotplug import LLM, SamplingParams
from hotplug.core.errors import UnsupportedModelError, WeightsError
from hotplug.core.layers.context import BuildContext
from hotplug.core.layers.moe import SparseMLP, unstacked
from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.plan import Plan
from hotplug.core.quant.scheme import QuantScheme
from hotplug.core.weights.checkpoint import open_checkpoint
from hotplug.core.weights.dummy import parameter_shapes

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 12, "norm_topk_prob": True, "mlp_only_layers": [0],
}  # fmt: skip
PROMPT = [(7 * i * i + 3 * i + 5) % 64 for i in range(11)]
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as transformers saves it: a matrix an expert."""
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("moe")
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES)).save_pretrained(folder)
    return folder


def rewritten(saved: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    shutil.copy(saved / "config.json", folder / "config.json")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same checkpoint with its experts in one tensor a projection."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(EXPERTS)}
    each = [{part: tensors[f"{EXPERTS}.{i}.{part}_proj.weight"] for part in ("gate", "up", "down")} for i in range(4)]
    kept[f"{EXPERTS}.gate_up_proj"] = torch.stack([torch.cat((e["gate"], e["up"])) for e in each])
    kept[f"{EXPERTS}.down_proj"] = torch.stack([e["down"] for e in each])
    return kept


def test_experts_load_one_by_one_or_stacked(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    again = rewritten(saved, tmp_path, stacked(tensors))
    expected = ModelRun(saved).logits(PROMPT, [len(PROMPT)])
    assert torch.equal(ModelRun(again).logits(PROMPT, [len(PROMPT)]), expected)


def test_only_stacks_of_experts_come_apart() -> None:
    for name, shape in (("mlp.gate_up_proj", (2, 4, 3)), ("mlp.experts.gate_up_proj", (4, 3)),
                        ("mlp.experts.0.down_proj.weight", (3, 2)), ("mlp.experts.other", (2, 4, 3))):  # fmt: skip
        assert [(n, tuple(t.shape)) for n, t in unstacked(name, torch.empty(shape))] == [(name, shape)]


def test_a_missing_expert_is_named(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors[f"{EXPERTS}.3.up_proj.weight"]
    with pytest.raises(WeightsError, match=rf"missing: {EXPERTS}\.3\.up_proj\.weight"):
        ModelRun(rewritten(saved, tmp_path, tensors))


def test_an_expert_too_many_is_named(saved: Path, tmp_path: Path) -> None:
    tensors = stacked(load_file(saved / "model.safetensors"))
    for name in ("gate_up_proj", "down_proj"):
        tensors[f"{EXPERTS}.{name}"] = torch.cat((tensors[f"{EXPERTS}.{name}"],) * 2)
    with pytest.raises(WeightsError, match=rf"shape of {EXPERTS}\.(gate_up|down)_proj is \[8, .*makes it \[4, "):
        ModelRun(rewritten(saved, tmp_path, tensors))


def test_stacked_experts_of_another_width_are_named(saved: Path, tmp_path: Path) -> None:
    tensors = stacked(load_file(saved / "model.safetensors"))
    tensors[f"{EXPERTS}.gate_up_proj"] = tensors[f"{EXPERTS}.gate_up_proj"][:, :-3]
    with pytest.raises(WeightsError, match=rf"shape of {EXPERTS}\.gate_up_proj is \[4, 21, 32\].*\[4, 24, 32\]"):
        ModelRun(rewritten(saved, tmp_path, tensors))


def test_dummy_weights_have_a_real_checkpoints_names_and_shapes(saved: Path) -> None:
    expected = {name: tuple(t.shape) for name, t in load_file(saved / "model.safetensors").items()}
    assert parameter_shapes(open_checkpoint(saved).config) == expected


def test_a_quantization_scheme_is_refused_by_name(saved: Path) -> None:
    scheme = cast("QuantScheme", SimpleNamespace(op=SimpleNamespace(name="linear_int8")))
    context = BuildContext(
        plan=Plan(builtin_registry(), arch="any"), dtype=torch.float32, device=torch.device("cpu"),
        kv=one_group(4), scheme=scheme, max_position=64,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp: experts quantized by linear_int8"):
        SparseMLP(context, "layers.1.mlp", open_checkpoint(saved).config)


def test_the_engine_generates_with_dummy_weights(tiny_moe_model: Path) -> None:
    llm = LLM(str(tiny_moe_model), device="cpu", load_format="dummy", kv_cache_memory="4MiB")
    outputs = llm.generate(["ab", "c"], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [5, 5]
