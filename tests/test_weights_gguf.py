"""GGUF: container, dequantization, metadata -> ModelConfig, names, and files that are damaged."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV,
    KV_HEADS,
    LAYERS,
    QUANT,
    VOCAB,
    random_tensors,
    stored,
    tensor_shapes,
    write_gguf,
)

from hotplug.core.errors import ModelError, UnsupportedModelError, WeightsError
from hotplug.core.text.tokenizer_files import load_tokenizer
from hotplug.core.weights.checkpoint import open_checkpoint
from hotplug.core.weights.gguf import hf_name
from hotplug.core.weights.gguf_file import GgufFile


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", random_tensors(tensor_shapes()))


def test_config_from_metadata(float_file: Path) -> None:
    config = open_checkpoint(float_file).config
    assert config.architecture == "LlamaForCausalLM"
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (HIDDEN, INNER, VOCAB)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (LAYERS, HEADS, KV_HEADS)
    assert (config.head_dim, config.max_position, config.rope.theta) == (HEAD_DIM, 512, 50000.0)
    assert config.tie_word_embeddings and not config.attention_bias and config.sliding_window is None


def test_smollm2_config(smollm2_path: Path) -> None:
    config = open_checkpoint(smollm2_path).config
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.max_position, config.bos_token_id, config.eos_token_ids) == (8192, 1, (2,))
    assert config.tie_word_embeddings


def test_names_are_hugging_faces(float_file: Path) -> None:
    names = {name for name, _ in open_checkpoint(float_file).tensors()}
    assert {"model.embed_tokens.weight", "model.norm.weight"} < names
    assert {"model.layers.1.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"} < names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize(
    "quant", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K"]
)
def test_dequantization_equals_the_packages_own(quant: str, tmp_path: Path) -> None:
    kind, tensors = QUANT[quant], random_tensors(tensor_shapes())
    path = write_gguf(tmp_path / "m.gguf", tensors, quant=kind)
    found = dict(open_checkpoint(path).tensors())
    expected = gguf.quants.dequantize(stored(tensors["blk.0.ffn_up.weight"], kind), kind)
    up = found["model.layers.0.mlp.up_proj.weight"]
    assert up.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(quant, torch.float32)
    assert up.shape == (INNER, HIDDEN)
    assert np.array_equal(up.float().numpy(), expected)


def test_query_and_key_rows_of_llama_are_put_back(tmp_path: Path) -> None:
    tensors = random_tensors(tensor_shapes())
    hf_query = tensors["blk.0.attn_q.weight"].copy()
    as_converted = hf_query.reshape(HEADS, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(HIDDEN, HIDDEN)
    path = write_gguf(tmp_path / "m.gguf", tensors | {"blk.0.attn_q.weight": as_converted})
    found = dict(open_checkpoint(path).tensors())
    assert np.array_equal(found["model.layers.0.self_attn.q_proj.weight"].numpy(), hf_query)


def test_smollm2_speaks_sense_in_transformers(smollm2_hf_dir: Path, smollm2_path: Path) -> None:
    """Wrongly ordered query rows or nibbles would still load; only the text tells."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_hf_dir, dtype=torch.float32)
    tokenizer = load_tokenizer(smollm2_path)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    with torch.inference_mode():
        output = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0].tolist()
    assert "The capital of France is Paris." in tokenizer.decode(output[len(prompt) :])


def test_qwen2_rows_stay_and_biases_are_found(tmp_path: Path) -> None:
    biases = {f"blk.{i}.attn_{p}.bias": (HIDDEN if p == "q" else KV,) for i in range(LAYERS) for p in "qkv"}
    tensors = random_tensors(tensor_shapes() | biases)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, architecture="qwen2"))
    found = dict(checkpoint.tensors())
    assert checkpoint.config.architecture == "Qwen2ForCausalLM" and checkpoint.config.attention_bias
    assert np.array_equal(found["model.layers.1.self_attn.k_proj.weight"].numpy(), tensors["blk.1.attn_k.weight"])
    assert np.array_equal(found["model.layers.1.self_attn.k_proj.bias"].numpy(), tensors["blk.1.attn_k.bias"])


def test_qwen3_has_query_and_key_norms(tmp_path: Path) -> None:
    norms = {f"blk.{i}.attn_{p}_norm.weight": (HEAD_DIM,) for i in range(LAYERS) for p in "qk"}
    path = write_gguf(tmp_path / "m.gguf", random_tensors(tensor_shapes() | norms), architecture="qwen3")
    names = dict(open_checkpoint(path).tensors())
    assert names["model.layers.0.self_attn.q_norm.weight"].shape == (HEAD_DIM,)


def test_output_weight_means_untied_embeddings(tmp_path: Path) -> None:
    tensors = random_tensors(tensor_shapes() | {"output.weight": (VOCAB, HIDDEN)})
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    assert not checkpoint.config.tie_word_embeddings
    assert "lm_head.weight" in dict(checkpoint.tensors())


def test_rope_freqs_become_frequency_factors(tmp_path: Path) -> None:
    tensors = random_tensors(tensor_shapes())
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors | {"rope_freqs.weight": factors}))
    assert np.array_equal(checkpoint.config.rope.freq_factors, factors)
    assert not any("rope" in name for name, _ in checkpoint.tensors())


def test_yarn_extends_the_context(tmp_path: Path) -> None:
    scaling = {
        "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 512,
    }  # fmt: skip
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", random_tensors(tensor_shapes()), metadata=scaling)).config
    assert (config.rope.kind, config.rope.factor, config.rope.original_max_position) == ("yarn", 4.0, 512)
    assert config.max_position == 2048
    assert config.rope.attention_factor == pytest.approx(1.1386, abs=1e-4)


def test_sliding_window_of_a_llama_file_is_mistrals(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", random_tensors(tensor_shapes()), metadata={"llama.attention.sliding_window": 64}
    )
    config = open_checkpoint(path).config
    assert (config.architecture, config.sliding_window) == ("MistralForCausalLM", 64)
    assert config.sliding_layers == {0, 1}


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.rope.dimension_count": 32}, "dimension_count"),
        ({"split.count": 3}, "split into 3"),
    ],
)
def test_variants_that_are_not_built_are_refused_by_name(metadata: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_tensors(tensor_shapes()), metadata=metadata)
    with pytest.raises(UnsupportedModelError, match=named):
        open_checkpoint(path)


def test_unknown_architecture_is_refused_with_the_built_ones(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_tensors(tensor_shapes()), architecture="mamba")
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*llama, qwen2, qwen3"):
        open_checkpoint(path)


def test_quantization_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    tensors = random_tensors(tensor_shapes())
    tensors["token_embd.weight"] = np.zeros((VOCAB, HIDDEN), np.int8)
    path = write_gguf(tmp_path / "m.gguf", tensors)
    with pytest.raises(UnsupportedModelError, match="I8"):
        open_checkpoint(path)


def test_what_is_dequantized_is_written_where_there_is_room_for_it(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", random_tensors(tensor_shapes()), quant=kind))
    expected = dict(checkpoint.tensors())
    rooms: dict[str, torch.Tensor] = {}

    def room(name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        return rooms.setdefault(name, torch.full(shape, torch.nan)) if "mlp" in name else None

    found = dict(checkpoint.tensors((), room))
    assert {name for name in found if "mlp" in name} == rooms.keys()
    assert all(found[name] is place for name, place in rooms.items())
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = random_tensors(tensor_shapes())
    del tensors["blk.1.ffn_up.weight"]
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))


def test_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    tensors = random_tensors(tensor_shapes() | {"blk.1.ffn_up.weight": (INNER, 2 * HIDDEN)})
    with pytest.raises(WeightsError, match=r"blk\.1\.ffn_up\.weight.*\[512, 512\].*\[512, 256\]"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))


def test_unknown_tensor_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="ffn_router"):
        hf_name("blk.0.ffn_router.weight", tmp_path)


@pytest.mark.parametrize("share", [0.0005, 0.001, 0.01, 0.5, 0.999])
def test_truncated_file_is_refused_before_reading(share: float, float_file: Path, tmp_path: Path) -> None:
    data = float_file.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(WeightsError, match=r"broken\.gguf: not a readable GGUF file"):
        open_checkpoint(broken)


def test_last_byte_missing_is_found_and_said(float_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    last = max(t.offset + t.nbytes for t in GgufFile(float_file).tensors.values())
    broken.write_bytes(float_file.read_bytes()[: last - 1])
    with pytest.raises(WeightsError, match="truncated"):
        open_checkpoint(broken)


def test_strings_that_are_not_text_are_found_when_they_are_asked_for(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["first", "second"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokens = GgufFile(tmp_path / "m.gguf").values["tokenizer.ggml.tokens"]
    assert (len(tokens), list(tokens), tokens[1]) == (2, ["first", "second"], "second")
    data = (tmp_path / "m.gguf").read_bytes().replace(b"second", b"se\xff\xffnd")
    (tmp_path / "m.gguf").write_bytes(data)
    broken = GgufFile(tmp_path / "m.gguf").values["tokenizer.ggml.tokens"]
    with pytest.raises(WeightsError, match=r"m\.gguf: not a readable GGUF file(.|\n)*not UTF-8"):
        broken[0]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 9, bytes(4096)])
def test_file_that_is_not_gguf_is_refused(content: bytes, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)
    with pytest.raises(WeightsError, match=r"broken\.gguf"):
        open_checkpoint(broken)


def test_big_endian_is_refused_by_name(float_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + float_file.read_bytes()[8:])
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        open_checkpoint(broken)


def test_flipped_header_bytes_never_escape_the_error_hierarchy(float_file: Path, tmp_path: Path) -> None:
    data, rng, refused = float_file.read_bytes(), random.Random(0), 0
    header = min(t.offset for t in GgufFile(float_file).tensors.values())
    broken = tmp_path / "broken.gguf"
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(3):
            changed[rng.randrange(4, header)] = rng.randrange(256)
        broken.write_bytes(changed)
        try:
            open_checkpoint(broken)
        except ModelError:
            refused += 1
    assert refused > 50
