"""What files of a model may say, and what is made of the rest: token ids, JSON, sizes, GGUF metadata, kinds of file."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_mutants import Gguf, small_gguf

from hotplug.core.config import EngineConfig
from hotplug.core.errors import ModelError, OutOfMemoryError, UnsupportedModelError, WeightsError
from hotplug.core.startup.bind import bind
from hotplug.core.text.tokenizer_files import load_tokenizer
from hotplug.core.weights.checkpoint import open_checkpoint
from hotplug.core.weights.config import ModelConfig
from hotplug.core.weights.hf_config import read_hf_config
from hotplug.core.weights.metadata import Metadata, read_json

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
STRING, ARRAY = 8, 9


def config_of(folder: Path, **values: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({**TINY, **values}))
    return read_hf_config(folder)


# --- end-of-sequence tokens -----------------------------------------------------------------------


@pytest.mark.parametrize("outside", [300, 128, -1, 4294967295, 2**63])
def test_end_tokens_outside_the_vocabulary_are_ignored_with_one_warning(outside: int, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, outside]}))
    with pytest.warns(UserWarning) as caught:
        config = config_of(tmp_path, eos_token_id=7)
    assert config.eos_token_ids == (7, 2)
    (warning,) = caught
    assert f"generation_config.json: eos_token_id {outside} is ignored" in str(warning.message)


def test_tokens_outside_the_vocabulary_in_config_json_are_ignored_by_key(tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as caught:
        config = config_of(tmp_path, eos_token_id=128, bos_token_id=-1)
    assert (config.eos_token_ids, config.bos_token_id) == ((), None)
    assert [key for key in ("eos_token_id 128", "bos_token_id -1") if any(key in str(w.message) for w in caught)] == [
        "eos_token_id 128", "bos_token_id -1"
    ]  # fmt: skip


def test_end_tokens_in_the_vocabulary_warn_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_of(tmp_path, eos_token_id=[127, 0], bos_token_id=None).eos_token_ids == (127, 0)


@pytest.mark.parametrize("value", ["2", 2.0, True, [2, "3"], [[2]], {"id": 2}, float("1e30")])
@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id"])
def test_tokens_that_are_no_whole_numbers_are_refused_by_key(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {key} must be a whole number or a list"):
        config_of(tmp_path, **{key: value})


@pytest.mark.parametrize("outside", [300, 4294967295, -1])
def test_an_engine_answers_whatever_end_tokens_its_files_name(outside: int, tiny_model: Path, tmp_path: Path) -> None:
    from hotplug import LLM, SamplingParams

    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [outside, 1]}))
    with pytest.warns(UserWarning, match=f"eos_token_id {outside} is ignored"):
        llm = LLM(str(tmp_path), device="cpu", load_format="dummy", kv_cache_memory="1MiB")
    last = llm.tokenizer.vocab_size - 1
    wanted = SamplingParams(temperature=0.0, max_tokens=3, min_tokens=3, logit_bias={last: 100})
    (answer,) = llm.generate([[5, 6]], wanted, progress=False)
    assert answer.outputs[0].token_ids == [last] * 3  # which -1 would hold back


def write(file: Gguf, folder: Path) -> Path:
    path = folder / "m.gguf"
    path.write_bytes(file.encode())
    return path


def with_values(changes: dict[str, tuple[int, Any]], base: Gguf | None = None) -> Gguf:
    """A small GGUF whose keys have other types and values, or are there besides."""
    file = base or small_gguf()
    known = {key: (kind, value) for key, kind, value in file.values} | changes
    return replace(file, values=[(key, *value) for key, value in known.items()])


@pytest.mark.parametrize("key", ["eos", "eot", "eom", "bos"])
@pytest.mark.parametrize(("kind", "outside"), [(4, 258), (4, 2**32 - 1), (5, -1), (11, -(2**63))])
def test_gguf_tokens_outside_the_vocabulary_are_ignored_with_one_warning(
    key: str, kind: int, outside: int, tmp_path: Path
) -> None:
    path = write(with_values({f"tokenizer.ggml.{key}_token_id": (kind, outside)}), tmp_path)
    with pytest.warns(UserWarning) as caught:
        config = open_checkpoint(path).config
    assert all(0 <= token < 258 for token in (*config.eos_token_ids, config.bos_token_id or 0))
    assert [str(w.message).count(f"tokenizer.ggml.{key}_token_id {outside} is ignored") for w in caught] == [1]
    assert all(0 <= token < 258 for token in load_tokenizer(path).eos_token_ids)


# --- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a JSON value"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' appears twice"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "nested more than"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested more than"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_json_that_is_not_strict_is_refused_by_file(text: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=said) as caught:
        read_hf_config(tmp_path)
    assert caught.value.where == str(tmp_path / "config.json")


def test_json_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(TINY).encode())
    assert read_hf_config(tmp_path).hidden_size == 64


def test_json_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(3 << 30)  # takes no room on the disk
    with pytest.raises(ModelError, match="more than 64 MiB"):
        read_json(tmp_path / "config.json")


def test_messages_show_a_line_of_a_value_whatever_its_size(tmp_path: Path) -> None:
    for value in ("x" * 10**6, [[[1] * 100] * 10] * 10, {"a" * 10**5: 1}, 10**400):
        with pytest.raises(ModelError) as caught:
            config_of(tmp_path, hidden_size=value)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("read", "values"),
    [
        (lambda m: m.integer("k", 1, 9), [0, 10, 1.0, "1", True, [1], 2**70]),
        (lambda m: m.number("k", 0.5, 9), [0.4, 9.1, float("nan"), float("inf"), "1", True, [1.0], 10**400]),
        (lambda m: m.flag("k", False), [0, 1, "true", [], {}]),
        (lambda m: m.text("k", most=3), ["four", 1, None, ["a"], "\ud800"]),
        (lambda m: m.texts("k", most=2, longest=3), ["ab", ["a", "b", "c"], [1], ["four"], ["\ud800"], {"a": 1}]),
        (lambda m: m.integers("k", 0, 9, most=2), [1, [10], [-1], [1, 2, 3], [1.0], [True], ["1"]]),
        (lambda m: m.array("k", 2), [[1, 2], np.zeros(3), np.array([1.0, np.nan]), np.array(["a", "b"]), 1]),
        (lambda m: m.by_layer("k", 1, 9), [np.zeros(0, np.int32), np.array([10, 10]), np.array([1.0])]),
        (lambda m: m.section("k"), [[], 1, "a", True]),
        (lambda m: m.sections("k"), [1, [1], [{}, None], {"a": {}}]),
    ],
)  # fmt: skip
def test_values_of_another_type_or_range_are_refused_by_file_and_key(
    read: Callable[[Metadata], Any], values: list[Any]
) -> None:
    for value in values:
        with pytest.raises(WeightsError, match=r"^f\.json: p\.k "):
            read(Metadata({"p.k": value}, "f.json", prefix="p.", error=WeightsError))


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a whole number from 1"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "hidden_size 64 is no multiple"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers must be a whole number from 1 to 10,000"),
        ({"hidden_size": 2**40}, "hidden_size must be a whole number"),
        ({"intermediate_size": 0}, "intermediate_size must be a whole number from 1"),
        ({"vocab_size": -1}, "vocab_size must be a whole number"),
        ({"head_dim": 7}, "do not fit together"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings must be a whole number"),
        ({"max_position_embeddings": 1e6}, "max_position_embeddings must be a whole number"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": -1}, "sliding_window must be a whole number"),
        ({"torch_dtype": "int4"}, "weights of dtype int4 are not served"),
        ({"torch_dtype": ["float16"]}, "torch_dtype must be a string"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
        ({"architectures": []}, "names no architecture"),
        ({"architectures": [None]}, "architectures must be a list of strings"),
        ({"model_type": ["llama"]}, "model_type must be a string"),
        ({"model_type": "mistral"}, "architectures says LlamaForCausalLM, model_type mistral"),
        ({"hidden_act": None, "quantization_config": "fp8"}, "quantized with an unnamed method"),
        ({"quantization_config": {"bits": 4}}, "quantized with an unnamed method"),
        ({"quantization_config": {"quant_method": ["gptq"]}}, "quant_method must be a string"),
    ],
)
def test_values_of_config_json_are_refused_by_key(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=named):
        config_of(tmp_path, **values)


def test_null_is_the_default_in_config_json(tmp_path: Path) -> None:
    optional = ("head_dim", "hidden_act", "tie_word_embeddings", "attention_bias", "torch_dtype", "rope_theta",
                "quantization_config", "num_key_value_heads", "eos_token_id", "model_type")  # fmt: skip
    with_null = config_of(tmp_path, **dict.fromkeys(optional))
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in TINY.items() if k not in optional}))
    assert with_null == read_hf_config(tmp_path)


def test_qwens_window_is_4096_where_it_is_only_switched_on(tmp_path: Path) -> None:
    import transformers

    values = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True,
              "max_window_layers": 2}  # fmt: skip
    config = config_of(tmp_path, **values)
    assert config.sliding_window == transformers.AutoConfig.from_pretrained(tmp_path).sliding_window == 4096
    assert config.sliding_layers == {2, 3}


# --- weights beside a config that promises others -------------------------------------------------


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"num_hidden_layers": 9_999}, "promises 9,999 layers, the files hold 2"),
        ({"vocab_size": 1 << 26}, r"shape of model\.embed_tokens\.weight is \[258, 32\]"),
        ({"hidden_size": 1 << 20, "head_dim": 8}, "the config makes it"),
        ({"intermediate_size": 1 << 24}, "the config makes it"),
        ({"vocab_size": 200}, r"shape of model\.embed_tokens\.weight is \[258, 32\]"),
    ],
)
def test_a_config_that_promises_more_than_the_files_hold_costs_no_memory(
    values: dict[str, Any], named: str, tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = dict(open_checkpoint(tmp_path, "dummy").tensors())
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    begin = time.monotonic()
    with pytest.raises(WeightsError, match=named):
        open_checkpoint(tmp_path)
    assert time.monotonic() - begin < 1.0


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["a"].update(data_offsets=[0, 8]),
        lambda h: h["b"].update(data_offsets=[8, 24]),
        lambda h: h["a"].update(data_offsets=[-16, 0]),
        lambda h: h["a"].update(dtype="F4096"),
        lambda h: h["a"].update(shape=[-2, -2]),
        lambda h: h["a"].update(shape=[2**62, 2**62]),
        lambda h: h["a"].update(shape="4"),
        lambda h: h.update(c=[]),
    ],
)
def test_safetensors_headers_that_cannot_be_are_refused(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    config_of(tmp_path)
    header: dict[str, Any] = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                              "b": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}}  # fmt: skip
    change(header)
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(32))
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a readable safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_safetensors_header_of_an_impossible_length_is_refused(length: int, tmp_path: Path) -> None:
    config_of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" + bytes(100))
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        open_checkpoint(tmp_path)


# --- GGUF metadata --------------------------------------------------------------------------------


NESTED: tuple[int, Any] = (4, [1])
for _ in range(300):
    NESTED = (ARRAY, [NESTED])


@pytest.mark.parametrize(
    ("key", "kind", "value", "named"),
    [
        ("split.count", STRING, "2", "split.count must be a whole number"),
        ("split.count", ARRAY, (4, [1]), "split.count must be a whole number"),
        ("general.file_type", STRING, "F16", "general.file_type must be a whole number"),
        ("general.file_type", ARRAY, (4, [1]), "general.file_type must be a whole number"),
        ("general.architecture", 4, 3, "general.architecture must be a string"),
        ("general.alignment", 4, 3, "general.alignment must be a power of two"),
        ("general.alignment", STRING, "32", "general.alignment must be a whole number"),
        ("tokenizer.ggml.eos_token_id", STRING, "2", "eos_token_id must be a whole number or a list"),
        ("tokenizer.ggml.eos_token_id", 6, float("nan"), "eos_token_id must be a whole number or a list"),
        ("tokenizer.ggml.bos_token_id", 7, True, "bos_token_id must be a whole number or a list"),
        ("llama.block_count", 4, 2**31, "llama.block_count must be a whole number from 1 to 10,000"),
        ("llama.block_count", 4, 9_999, "promises 9,999 layers, the files hold 2"),
        ("llama.block_count", 6, 2.0, "llama.block_count must be a whole number"),
        ("llama.embedding_length", 4, 0, "llama.embedding_length must be a whole number from 1"),
        ("llama.attention.head_count_kv", 4, 0, "llama.attention.head_count_kv must be a whole number from 1"),
        ("llama.attention.head_count_kv", 4, 3, "do not fit together"),
        ("llama.attention.head_count_kv", ARRAY, (4, [2, 4]), "head_count_kv differs by layer"),
        ("llama.attention.layer_norm_rms_epsilon", 6, float("nan"), "layer_norm_rms_epsilon must be a number"),
        ("llama.attention.layer_norm_rms_epsilon", 6, 0.0, "layer_norm_rms_epsilon must be a number"),
        ("llama.context_length", 4, 0, "llama.context_length must be a whole number"),
        ("llama.context_length", ARRAY, (ARRAY, [(4, [1])]), "'llama.context_length' is an array of arrays"),
        ("llama.context_length", ARRAY, NESTED, "is an array of arrays"),
        ("llama.context_length", 13, 0, "unknown metadata type 13"),
        ("llama.context_length", ARRAY, (99, []), "an array of the unknown metadata type 99"),
    ],
)  # fmt: skip
def test_gguf_values_are_refused_by_file_and_key(key: str, kind: int, value: Any, named: str, tmp_path: Path) -> None:
    path = write(with_values({key: (kind, value)}), tmp_path)
    begin = time.monotonic()
    with pytest.raises(ModelError, match=named.replace(".", r"\.")) as caught:
        open_checkpoint(path)
    assert time.monotonic() - begin < 1.0 and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("model", "key", "kind", "value", "named"),
    [
        ("gpt2", "merges", ARRAY, (STRING, ["zz yy"]), "tokenizer.ggml.merges do not fit the vocabulary"),
        ("gpt2", "merges", ARRAY, (STRING, ["a"]), "tokenizer.ggml.merges must hold pairs of tokens"),
        ("gpt2", "merges", ARRAY, (4, [1, 2]), "tokenizer.ggml.merges must be a list of"),
        ("gpt2", "merges", 4, 3, "tokenizer.ggml.merges must be a list of"),
        ("gpt2", "merges", STRING, "a b", "tokenizer.ggml.merges must be a list of"),
        ("gpt2", "token_type", 4, 3, "tokenizer.ggml.token_type must be an array of 258 numbers"),
        ("gpt2", "token_type", ARRAY, (5, [1] * 259), "tokenizer.ggml.token_type must be an array of 258 numbers"),
        ("gpt2", "token_type", ARRAY, (STRING, ["a"] * 258), "tokenizer.ggml.token_type must be an array of 258"),
        ("gpt2", "tokens", 4, 3, "tokenizer.ggml.tokens must be a list of"),
        ("gpt2", "tokens", ARRAY, (4, [1] * 258), "tokenizer.ggml.tokens must be a list of"),
        ("gpt2", "tokens", ARRAY, (STRING, []), "no vocabulary"),
        ("gpt2", "tokens", ARRAY, (STRING, ["x" * 100_000] * 258), "strings of at most 1,024 characters"),
        ("gpt2", "model", 4, 3, "tokenizer.ggml.model must be a string"),
        ("gpt2", "pre", 4, 3, "tokenizer.ggml.pre must be a string"),
        ("gpt2", "add_bos_token", STRING, "yes", "tokenizer.ggml.add_bos_token must be true or false"),
        ("llama", "scores", ARRAY, (6, [0.0]), "tokenizer.ggml.scores must be an array of 258 numbers"),
        ("llama", "scores", ARRAY, (6, [float("nan")] * 258), "tokenizer.ggml.scores must hold finite numbers"),
        ("llama", "scores", 6, 1.0, "tokenizer.ggml.scores must be an array of 258 numbers"),
        ("llama", "unknown_token_id", STRING, "0", "tokenizer.ggml.unknown_token_id must be a whole number"),
    ],
)  # fmt: skip
def test_gguf_tokenizers_are_refused_by_file_and_key(
    model: str, key: str, kind: int, value: Any, named: str, tmp_path: Path
) -> None:
    path = write(with_values({f"tokenizer.ggml.{key}": (kind, value)}, small_gguf(model)), tmp_path)
    with pytest.raises(ModelError, match=named.replace(".", r"\.")) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_a_chat_template_that_is_no_text_is_refused_by_key(tmp_path: Path) -> None:
    path = write(with_values({"tokenizer.chat_template": (4, 1)}), tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer\.chat_template must be a string"):
        load_tokenizer(path)


@pytest.mark.parametrize("counts", [(2**63, 25), (20, 2**63), (2**20, 25), (20, 2**20), (2**64 - 1, 2**64 - 1)])
def test_gguf_counts_beyond_the_file_are_refused_at_once(counts: tuple[int, int], tmp_path: Path) -> None:
    path = write(replace(small_gguf(), counts=counts), tmp_path)
    with path.open("ab") as file:
        file.truncate(200 << 20)  # zeros, which read as tensors without a name
    begin = time.monotonic()
    with pytest.raises(WeightsError, match=r"m\.gguf: not a readable GGUF file"):
        open_checkpoint(path)
    assert time.monotonic() - begin < 1.0


@pytest.mark.parametrize("length", [0, 2**20, 2**40, 2**63, 2**64 - 1])
def test_gguf_arrays_of_an_impossible_length_are_refused_at_once(length: int, tmp_path: Path) -> None:
    file = small_gguf()
    at = next(i for i, (key, *_) in enumerate(file.values) if key == "tokenizer.ggml.tokens")
    path = write(replace(file, lengths={at: length}), tmp_path)
    begin = time.monotonic()
    with pytest.raises(ModelError, match=r"m\.gguf"):
        open_checkpoint(path)
    assert time.monotonic() - begin < 1.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda name, shape, kind, at: (name, shape, kind, 0), "overlap"),
        (lambda name, shape, kind, at: (name, shape, kind, at + 1), "no multiple of 32"),
        (lambda name, shape, kind, at: (name, shape, kind, 2**63), "truncated"),
        (lambda name, shape, kind, at: (name, (2**62, 2**62), kind, at), "truncated"),
        (lambda name, shape, kind, at: (name, (0, 32), kind, at), "has the shape"),
        (lambda name, shape, kind, at: (name, (), kind, at), "has the shape"),
        (lambda name, shape, kind, at: (name, (1,) * 5, kind, at), "claims 5 dimensions"),
        (lambda name, shape, kind, at: (name, shape, 250, at), "unknown quantization type 250"),
        (lambda name, shape, kind, at: ("n" * 65, shape, kind, at), "longer than 64 bytes"),
        (lambda name, shape, kind, at: ("token_embd.weight", shape, kind, at), "appears twice"),
    ],
)
def test_gguf_tensors_that_cannot_be_are_refused(change: Callable[..., Any], named: str, tmp_path: Path) -> None:
    file = small_gguf()
    file.tensors[3] = change(*file.tensors[3])
    with pytest.raises(ModelError, match=named):
        open_checkpoint(write(file, tmp_path))


def test_a_gguf_key_that_appears_twice_is_refused(tmp_path: Path) -> None:
    file = small_gguf()
    file.values.append(file.values[2])
    with pytest.raises(WeightsError, match=r"the key 'llama\.block_count' appears twice"):
        open_checkpoint(write(file, tmp_path))


def test_a_gguf_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(300)]
    with pytest.raises(WeightsError, match=r"tokens has 300 entries, token_embd\.weight 258 rows"):
        open_checkpoint(write(with_values({"tokenizer.ggml.tokens": (ARRAY, (STRING, tokens))}), tmp_path))


# --- what is no model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"general.type": (STRING, "adapter"), "adapter.type": (STRING, "lora")}, "LoRA adapter.*llama-export-lora"),
        ({"adapter.type": (STRING, "lora")}, "LoRA adapter"),
        ({"general.type": (STRING, "imatrix")}, "importance matrix"),
        ({"imatrix.datasets": (ARRAY, (STRING, ["a"]))}, "importance matrix"),
        ({"general.type": (STRING, "mmproj")}, "projector"),
        ({"split.count": (2, 3)}, "split into 3 files is not read.*llama-gguf-split --merge"),
    ],
)
def test_gguf_files_that_are_no_whole_model_are_refused_by_what_they_are(
    values: dict[str, tuple[int, Any]], named: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        open_checkpoint(write(with_values(values), tmp_path))


def test_a_folder_of_split_gguf_files_is_refused_as_one(tmp_path: Path) -> None:
    for part in (1, 2):
        (tmp_path / f"m-{part:05}-of-00002.gguf").write_bytes(small_gguf().encode())
    with pytest.raises(UnsupportedModelError, match=r"split into 2 files is not read.*--merge"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("with_model", [False, True])
def test_a_folder_with_an_adapter_is_refused_with_the_models_name(with_model: bool, tmp_path: Path) -> None:
    if with_model:
        config_of(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    with pytest.raises(UnsupportedModelError, match=r"LoRA adapter to org/base.*merge_and_unload"):
        open_checkpoint(tmp_path)


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "m.gguf"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError, match=r"config\.json: it is not a file"):
        read_hf_config(tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer\.json: it is not a file"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match=r"m\.gguf: it is not a file"):
        open_checkpoint(tmp_path / "m.gguf")
    (tmp_path / "config.json").unlink()
    config_of(tmp_path)
    with pytest.raises(ModelError, match=r"model\.safetensors: it is not a file"):
        open_checkpoint(tmp_path, "safetensors")


def test_folders_and_loops_in_place_of_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json: it is not a file"):
        read_hf_config(tmp_path)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(ModelError, match="loop: cannot read it: Too many levels"):
        open_checkpoint(loop)
    with pytest.raises(ModelError, match="cannot read it"):
        open_checkpoint(tmp_path / "a\0b")


# --- the context that is served -------------------------------------------------------------------


def engine_config(folder: Path, **values: Any) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cpu", load_format="dummy", max_num_seqs=2, **values)


def with_positions(tiny_model: Path, folder: Path, positions: int) -> Path:
    config = json.loads((tiny_model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    return folder


@pytest.mark.parametrize("positions", [4_000_000, 10**9])
def test_the_rotary_table_is_as_long_as_what_the_cache_holds(positions: int, tiny_model: Path, tmp_path: Path) -> None:
    bound = bind(engine_config(with_positions(tiny_model, tmp_path, positions), kv_cache_memory="1MiB"))
    held = (1 << 20) // bound.kv.block_bytes * bound.kv.groups.block_size
    assert held < bound.model.decoder.cos_sin.shape[0] <= held + bound.kv.groups.block_size
    assert bound.options.max_model_len == positions


def test_a_prompt_beyond_the_cache_is_refused_for_the_cache(tiny_model: Path, tmp_path: Path) -> None:
    from hotplug.core.engine.core import EngineCore
    from hotplug.core.errors import PromptTooLongError
    from hotplug.core.request import Request, SamplingParams

    core = EngineCore(engine_config(with_positions(tiny_model, tmp_path, 10**9), kv_cache_memory="1MiB"))
    last = core.max_model_len - 2
    core.add(Request(id="0", prompt_token_ids=[5] * last, sampling=SamplingParams(max_tokens=1)))
    while core.has_work:
        core.step()
    with pytest.raises(PromptTooLongError, match="the KV cache holds"):
        core.add(Request(id="1", prompt_token_ids=[5] * (last + 2), sampling=SamplingParams()))


def test_a_context_too_long_for_the_device_is_refused_with_the_option(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemoryError, match="--max-model-len"):
        bind(engine_config(with_positions(tiny_model, tmp_path, 10**9)))


def test_the_table_is_the_same_in_parts_and_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from hotplug.core.layers import rope
    from hotplug.core.weights.config import RopeConfig

    whole = rope.rotary_table(RopeConfig(), 8, 100, torch.device("cpu"))
    monkeypatch.setattr(rope, "_POSITIONS", 7)
    assert torch.equal(rope.rotary_table(RopeConfig(), 8, 100, torch.device("cpu")), whole)
    assert rope.rotary_table(RopeConfig(), 8, 10**9, torch.device("meta")).shape == (10**9, 8)
