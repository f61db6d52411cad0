"""Hugging Face folders: config.json in every spelling, safetensors whole and sharded, dummy weights, damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hotplug.core.errors import ConfigError, ModelError, UnsupportedModelError, WeightsError
from hotplug.core.weights.checkpoint import find_gguf, open_checkpoint
from hotplug.core.weights.config import ModelConfig
from hotplug.core.weights.dummy import DummyCheckpoint, parameter_shapes
from hotplug.core.weights.hf_config import read_hf_config

TINY = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def config_of(folder: Path, architecture: str = "LlamaForCausalLM", **values: Any) -> ModelConfig:
    document = {**TINY, "architectures": [architecture], **values}
    (folder / "config.json").write_text(json.dumps(document))
    return read_hf_config(folder)


def save_tiny(folder: Path, architecture: str, shard: str = "1GB", **values: Any) -> Any:
    """A random tiny model saved by transformers, the way users' checkpoints are made."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**TINY, **values)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folder_saved_by_transformers_reads_back(architecture: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, architecture)
    checkpoint = open_checkpoint(tmp_path)
    config = checkpoint.config
    assert config.architecture == f"{architecture}ForCausalLM"
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (4, 4, 2)
    assert config.head_dim == (128 if architecture == "Qwen3" else 16)
    assert config.rms_norm_eps == model.config.rms_norm_eps
    expected, found = model.state_dict(), dict(checkpoint.tensors())
    assert found.keys() == expected.keys() == parameter_shapes(config).keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dummy_weights_have_a_real_checkpoints_names_and_shapes(architecture: str, tmp_path: Path) -> None:
    expected = save_tiny(tmp_path, architecture, tie_word_embeddings=True).state_dict()
    found = {name: tensor.shape for name, tensor in open_checkpoint(tmp_path, "dummy").tensors()}
    assert found == {name: tensor.shape for name, tensor in expected.items() if name != "lm_head.weight"}


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    expected = save_tiny(tmp_path, "Llama", shard="200KB").state_dict()
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) > 1
    found = dict(checkpoint.tensors())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, "Llama", shard="200KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(WeightsError, match=gone.name):
        open_checkpoint(tmp_path)


def test_shard_that_lacks_a_promised_tensor_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, "Llama", shard="200KB")
    index = tmp_path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["model.absent.weight"] = document["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(document))
    with pytest.raises(WeightsError, match=r"model\.absent\.weight"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_safetensors_is_refused_at_opening(share: float, tmp_path: Path) -> None:
    save_tiny(tmp_path, "Llama")
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a readable safetensors file"):
        open_checkpoint(tmp_path)


def test_garbage_in_the_header_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "Llama")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"\xff" * 64 + file.read_bytes()[72:])
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


def test_weights_of_an_integer_dtype_are_refused_by_name(tmp_path: Path) -> None:
    config_of(tmp_path)
    save_file({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight.*I8"):
        open_checkpoint(tmp_path)


def test_rotary_buffers_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    expected = save_tiny(tmp_path, "Llama").state_dict()
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file({**expected, **buffer}, tmp_path / "model.safetensors")
    assert {name for name, _ in open_checkpoint(tmp_path).tensors()} == expected.keys()


# --- config.json ----------------------------------------------------------------------------------


def test_unsupported_architecture_is_refused_with_the_built_ones(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"GemmaForCausalLM.*LlamaForCausalLM"):
        config_of(tmp_path, "GemmaForCausalLM")


def test_a_plugins_architecture_is_taken_when_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "architectures": ["AcmeForCausalLM"], "acme": 1}))
    config = read_hf_config(tmp_path, ["AcmeForCausalLM"])
    assert (config.architecture, config.raw["acme"]) == ("AcmeForCausalLM", 1)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"architectures": []}', "\x00\x01"])
def test_malformed_config_json_is_refused_by_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number from 1"),
        ({"num_key_value_heads": 3}, "do not fit together"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a number from"),
    ],
)
def test_impossible_values_are_named(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=named):
        config_of(tmp_path, **values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_variants_that_are_not_built_are_refused_by_name(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        config_of(tmp_path, **values)


@pytest.mark.parametrize(
    "values",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
    ],
)
def test_rope_reads_the_same_in_every_spelling(values: dict[str, Any], tmp_path: Path) -> None:
    rope = config_of(tmp_path, **values).rope
    assert (rope.theta, rope.kind, rope.factor) == (5e5, "linear", 2.0)


def test_llama3_rope(tmp_path: Path) -> None:
    rope = config_of(
        tmp_path,
        rope_scaling={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ).rope  # fmt: skip
    assert (rope.kind, rope.factor, rope.original_max_position) == ("llama3", 8.0, 64)
    assert (rope.low_freq_factor, rope.high_freq_factor) == (1.0, 4.0)


def test_yarn_rope_extends_the_context_and_carries_its_attention_factor(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, "Qwen2ForCausalLM",
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    )  # fmt: skip
    assert (config.rope.kind, config.max_position) == ("yarn", 1024)
    assert config.rope.attention_factor == pytest.approx(1.1386, abs=1e-4)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_dtype_in_both_spellings(key: str, tmp_path: Path) -> None:
    assert config_of(tmp_path, **{key: "bfloat16"}).dtype == "bfloat16"


def test_mistral_slides_on_every_layer_unless_null(tmp_path: Path) -> None:
    sliding = config_of(tmp_path, "MistralForCausalLM", sliding_window=32)
    full = config_of(tmp_path, "MistralForCausalLM", sliding_window=None)
    assert (sliding.sliding_window, sliding.sliding_layers) == (32, {0, 1, 2, 3})
    assert (full.sliding_window, full.sliding_layers) == (None, frozenset())


def test_qwen_slides_only_when_told_to(tmp_path: Path) -> None:
    assert config_of(tmp_path, "Qwen2ForCausalLM", sliding_window=32).sliding_window is None
    on = {"sliding_window": 32, "use_sliding_window": True}
    late = config_of(tmp_path, "Qwen2ForCausalLM", max_window_layers=3, **on)
    assert (late.sliding_window, late.sliding_layers) == (32, {3})
    types = ["sliding_attention", "full_attention"] * 2
    assert config_of(tmp_path, "Qwen3ForCausalLM", layer_types=types, **on).sliding_layers == {0, 2}


MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def moe_config_of(folder: Path, **values: Any) -> ModelConfig:
    return config_of(folder, "Qwen3MoeForCausalLM", **{**MOE, **values})


def test_every_layer_of_a_mixture_is_sparse_unless_told_otherwise(tmp_path: Path) -> None:
    config = moe_config_of(tmp_path)
    assert (config.num_experts, config.experts_per_token, config.moe_intermediate_size) == (8, 2, 32)
    assert config.sparse_layers == {0, 1, 2, 3} and not config.norm_topk_prob
    assert moe_config_of(tmp_path, mlp_only_layers=[0, 2]).sparse_layers == {1, 3}
    assert moe_config_of(tmp_path, decoder_sparse_step=2).sparse_layers == {1, 3}
    assert moe_config_of(tmp_path, decoder_sparse_step=2, mlp_only_layers=[3]).sparse_layers == {1}
    assert moe_config_of(tmp_path, norm_topk_prob=True).norm_topk_prob


def test_the_number_of_experts_in_both_spellings(tmp_path: Path) -> None:
    assert moe_config_of(tmp_path, num_experts=None, num_local_experts=5).num_experts == 5


def test_dense_models_have_no_experts_whatever_their_config_says(tmp_path: Path) -> None:
    config = config_of(tmp_path, "Qwen3ForCausalLM", **MOE)
    assert (config.num_experts, config.sparse_layers) == (0, frozenset())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"num_experts": None}, "num_local_experts is missing"),
        ({"num_experts": 0}, "num_experts must be a whole number from 1"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok must be a whole number from 1 to 8, got 9"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be a whole number from 1"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number from 1"),
        ({"mlp_only_layers": [4]}, "mlp_only_layers must hold whole numbers from 0 to 3, got 4"),
        ({"mlp_only_layers": 2}, "mlp_only_layers must be a list"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false"),
        ({"n_shared_experts": 1}, "shared experts are not built: n_shared_experts is 1"),
        ({"shared_expert_intermediate_size": 64}, "shared experts are not built"),
    ],
)
def test_impossible_mixtures_are_named(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=named):
        moe_config_of(tmp_path, **values)


def test_qwen3_moe_slides_on_every_layer_when_told_to(tmp_path: Path) -> None:
    assert moe_config_of(tmp_path, sliding_window=32).sliding_window is None
    config = moe_config_of(tmp_path, use_sliding_window=True, max_window_layers=3)
    assert (config.sliding_window, config.sliding_layers) == (4096, {0, 1, 2, 3})


def test_llamas_attention_bias_is_on_the_output_too(tmp_path: Path) -> None:
    llama = config_of(tmp_path, attention_bias=True, mlp_bias=True)
    qwen2 = config_of(tmp_path, "Qwen2ForCausalLM")
    assert llama.attention_bias and llama.output_bias and llama.mlp_bias
    assert qwen2.attention_bias and not qwen2.output_bias


def test_end_tokens_of_the_generation_config_are_merged(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert config_of(tmp_path, eos_token_id=7, bos_token_id=1).eos_token_ids == (7, 2, 9)


# --- what is opened -------------------------------------------------------------------------------


def test_unknown_load_format_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="safetensors"):
        open_checkpoint(tmp_path, "safetensor")


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    config_of(tmp_path)
    with pytest.raises(WeightsError, match=r"no \*\.safetensors file"):
        open_checkpoint(tmp_path)


def test_folder_with_two_gguf_files_asks_for_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(WeightsError, match=r"a\.gguf, b\.gguf"):
        find_gguf(tmp_path)


def test_dummy_needs_a_config(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="to take the shapes from"):
        open_checkpoint(tmp_path, "dummy")


def test_dummy_takes_its_shapes_from_a_gguf_too(smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_path, "dummy")
    assert next(checkpoint.tensors())[1].shape == (49152, 576)


def test_dummy_weights_repeat_with_the_seed_and_differ_without(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    name = "model.layers.2.mlp.up_proj.weight"
    first, same, other = (dict(DummyCheckpoint(config, (), seed).tensors()) for seed in (1, 1, 2))
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["model.layers.1.mlp.up_proj.weight"])
    assert (first["model.norm.weight"] == 1).all()


def test_fill_gives_what_tensors_gives(tmp_path: Path) -> None:
    checkpoint = DummyCheckpoint(config_of(tmp_path), (), 3)
    name, expected = next(checkpoint.tensors())
    parameter = torch.zeros_like(expected)
    checkpoint.fill(name, parameter)
    assert torch.equal(parameter, expected)
