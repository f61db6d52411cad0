"""Rotary embedding as model files describe it: config.json as transformers reads it, GGUF as llama.cpp does."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import random_tensors, tensor_shapes, write_gguf
from model_runs import ModelRun

from hotplug.core.errors import ModelError
from hotplug.core.layers.rope import rotary_table
from hotplug.core.weights.checkpoint import open_checkpoint
from hotplug.core.weights.hf_config import read_hf_config

SIZES = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}

SAME_AS_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "scaling alone": {"rope_scaling": YARN},
    "scaling and theta": {"rope_scaling": YARN, "rope_theta": 500.0},
    "scaling after parameters": {"rope_parameters": PLAIN, "rope_scaling": YARN},
    "scaling before parameters": {"rope_scaling": YARN, "rope_parameters": PLAIN},
    "scaling with a theta of its own": {"rope_parameters": PLAIN, "rope_scaling": {**YARN, "rope_theta": 7.0}},
    "scaling, parameters and theta": {"rope_parameters": PLAIN, "rope_theta": 99.0, "rope_scaling": YARN},
    "linear beside yarn": {"rope_parameters": YARN, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "parameters and theta": {"rope_parameters": PLAIN, "rope_theta": 99.0},
    "theta outside of parameters": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 99.0},
    "scaling is null": {"rope_parameters": PLAIN, "rope_scaling": None},
    "scaling is empty": {"rope_parameters": PLAIN, "rope_scaling": {}},
    "parameters are null": {"rope_parameters": None, "rope_scaling": YARN},
    "both are null": {"rope_parameters": None, "rope_scaling": None},
    "the old name in parameters": {"rope_parameters": {"type": "linear", "factor": 2.0}},
    "two names that disagree": {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
    "original positions outside": {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    "original positions left out": {"rope_scaling": LLAMA3},
    "a yarn factor of null": {"rope_scaling": {**YARN, "factor": None}},
    "betas of 0": {"rope_scaling": {**YARN, "beta_fast": 0, "beta_slow": 0}},
    "one mscale": {"rope_scaling": {**YARN, "mscale": 0.7}},
    "a factor below 1": {"rope_scaling": {"type": "linear", "factor": 0.5}},
}


def write_config(folder: Path, family: str, **values: Any) -> dict[str, Any]:
    document = {**SIZES, "model_type": family, "architectures": [f"{FAMILIES[family]}ForCausalLM"], **values}
    document |= MOE if family == "qwen3_moe" else {}
    (folder / "config.json").write_text(json.dumps(document))
    return document


def theirs(folder: Path, family: str) -> torch.Tensor:
    """The table [64, head_dim] that transformers' own module computes of the folder's config."""
    import transformers

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    rotary = getattr(module, f"{FAMILIES[family]}RotaryEmbedding")(transformers.AutoConfig.from_pretrained(folder))
    cos, sin = rotary(torch.zeros(1, 1, dtype=torch.float32), torch.arange(64)[None])
    return torch.cat((cos[0, :, :4], sin[0, :, :4]), dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", SAME_AS_TRANSFORMERS)
def test_config_json_is_read_as_transformers_reads_it(case: str, family: str, tmp_path: Path) -> None:
    write_config(tmp_path, family, **SAME_AS_TRANSFORMERS[case])
    config = read_hf_config(tmp_path)
    ours = rotary_table(config.rope, config.head_dim, 64, torch.device("cpu"))
    torch.testing.assert_close(ours, theirs(tmp_path, family), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"rope_scaling": [1]}, "rope_scaling must be an object, got"),
        ({"rope_scaling": 2.0}, "rope_scaling must be an object, got 2.0"),
        ({"rope_parameters": "yarn"}, "rope_parameters must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a number from"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor must be a number from"),
        ({"rope_scaling": {"type": "linear", "factor": [2]}}, "factor must be a number from"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number from"),
        ({"rope_scaling": {**YARN, "factor": 0}}, "factor must be a number from"),
        ({"rope_scaling": {**YARN, "factor": 1e308}}, "factor must be a number from"),
        ({"rope_scaling": {**YARN, "factor": 1e6, "original_max_position_embeddings": 1 << 20}}, "stretches"),
        ({"rope_scaling": {**YARN, "attention_factor": 0}}, "attention_factor must be a number from"),
        ({"rope_scaling": {**YARN, "rope_theta": 1}}, "rope_theta must be above 1 with yarn"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "original_max_position_embeddings must be"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor must be above low_freq_factor"),
        ({"rope_theta": 0}, "rope_theta must be a number from"),
        ({"rope_scaling": {"type": 3}}, "type must be a string"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "'mrope' is not built"),
        ({"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}}, "by layer type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "partial rotary factor"),
    ],
)
def test_what_would_give_nan_or_is_not_built_is_refused_by_key(
    values: dict[str, Any], named: str, tmp_path: Path
) -> None:
    write_config(tmp_path, "llama", **values)
    with pytest.raises(ModelError, match=named) as caught:
        read_hf_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_with_a_scaling_added_to_a_saved_folder_equal_transformers(family: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{FAMILIES[family]}Config")(**SIZES, rope_parameters=PLAIN)
    getattr(transformers, f"{FAMILIES[family]}ForCausalLM")(config).save_pretrained(tmp_path)
    plain = ModelRun(tmp_path).logits(list(range(40)), [40])
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**document, "rope_scaling": YARN}))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.arange(40)[None]).logits[0]
    found = ModelRun(tmp_path).logits(list(range(40)), [40])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3


# --- GGUF -----------------------------------------------------------------------------------------


def gguf_rope(folder: Path, **values: Any) -> Any:
    metadata = {f"llama.rope.{key}": value for key, value in values.items()}
    path = write_gguf(folder / "m.gguf", random_tensors(tensor_shapes()), metadata=metadata)
    return open_checkpoint(path).config.rope


def test_a_gguf_factor_without_a_type_is_linear(tmp_path: Path) -> None:
    rope = gguf_rope(tmp_path, **{"scaling.factor": 4.0})
    assert (rope.kind, rope.factor) == ("linear", 4.0)


def test_the_old_gguf_key_of_a_linear_factor_is_read(tmp_path: Path) -> None:
    rope = gguf_rope(tmp_path, scale_linear=2.0)
    assert (rope.kind, rope.factor) == ("linear", 2.0)


def test_a_gguf_factor_counts_for_nothing_where_the_type_is_none(tmp_path: Path) -> None:
    assert gguf_rope(tmp_path, **{"scaling.type": "none", "scaling.factor": 4.0}).kind == "default"


@pytest.mark.parametrize("values", [{"scaling.factor": 0.0}, {"scaling.type": "linear", "scaling.factor": 0.0}])
def test_a_linear_gguf_factor_of_0_is_none(values: dict[str, Any], tmp_path: Path) -> None:
    rope = gguf_rope(tmp_path, **values)
    assert rope.kind == "default"
    assert torch.isfinite(rotary_table(rope, 64, 8, torch.device("cpu"))).all()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"scaling.type": "yarn", "scaling.factor": 0.0}, r"llama\.rope\.scaling\.factor must be a number"),
        ({"scaling.type": "yarn", "scaling.factor": 1e38}, r"llama\.rope\.scaling\.factor must be a number"),
        ({"scaling.type": "yarn", "scaling.factor": float("nan")}, r"llama\.rope\.scaling\.factor must be a number"),
        ({"scaling.factor": -2.0}, r"llama\.rope\.scaling\.factor must be a number"),
        ({"scaling.factor": "4"}, r"llama\.rope\.scaling\.factor must be a number"),
        ({"scaling.type": 1}, r"llama\.rope\.scaling\.type must be a string"),
        ({"scaling.type": "yarn", "scaling.attn_factor": 0.0}, r"llama\.rope\.scaling\.attn_factor must be a number"),
    ],
)
def test_a_gguf_scaling_that_would_give_nan_is_refused_by_key(
    values: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=named):
        gguf_rope(tmp_path, **values)


def test_a_gguf_frequency_base_of_0_is_refused_by_key(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_tensors(tensor_shapes()), rope_freq_base=0.0)
    with pytest.raises(ModelError, match=r"llama\.rope\.freq_base must be a number"):
        open_checkpoint(path)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_gguf_frequency_factors_that_would_give_nan_are_refused(value: float, tmp_path: Path) -> None:
    tensors = random_tensors(tensor_shapes())
    tensors["rope_freqs.weight"] = np.full(32, value, np.float32)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight must hold finite numbers above 0"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
