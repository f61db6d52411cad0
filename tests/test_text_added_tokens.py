"""Tokens that a folder declares beside tokenizer.json: ids and text as AutoTokenizer gives them."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from hotplug.core.errors import ModelError
from hotplug.core.text.tokenizer_files import load_tokenizer

BYTES = [f"<0x{i:02X}>" for i in range(256)]
LETTERS = [*map(chr, range(0x21, 0x7F))]


def byte_level() -> tokenizers.Tokenizer:
    vocabulary = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<in>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    words = {token: i for i, token in enumerate(["<unk>", *BYTES, "▁", *LETTERS, "<in>"])}
    backend = tokenizers.Tokenizer(models.BPE(words, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return backend


def unigram() -> tokenizers.Tokenizer:
    words = [("<unk>", 0.0), *((token, -3.0) for token in ["▁", *LETTERS, "<in>"])]
    backend = tokenizers.Tokenizer(models.Unigram(words, 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def word_piece() -> tokenizers.Tokenizer:
    words = {token: i for i, token in enumerate(["[UNK]", *LETTERS, *(f"##{c}" for c in LETTERS), "<in>"])}
    backend = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


KINDS = {"byte-level": byte_level, "byte-fallback": byte_fallback, "unigram": unigram, "wordpiece": word_piece}


@cache
def tokenizer_json(kind: str) -> str:
    backend = KINDS[kind]()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend.to_str()


def write(folder: Path, kind: str = "byte-level", **files: Any) -> Path:
    (folder / "tokenizer.json").write_text(tokenizer_json(kind))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


NAMES = ["<a>", "<b>", "<in>", "<s>", "word", "<über>", "</s>"]
NAME = st.sampled_from(NAMES)
FLAGS = st.fixed_dictionaries(
    {"content": NAME},
    optional={flag: st.booleans() for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")},
)
TOKEN = st.one_of(NAME, FLAGS.map(lambda flags: {**flags, "__type": "AddedToken"}))
ROLES = st.dictionaries(st.sampled_from(["bos_token", "eos_token", "pad_token", "unk_token"]), TOKEN, max_size=3)
CONFIG = st.fixed_dictionaries({"tokenizer_class": st.just("PreTrainedTokenizerFast")}, optional={
    "added_tokens_decoder": st.dictionaries(st.integers(0, 600).map(str), FLAGS, max_size=4),
    "extra_special_tokens": st.one_of(st.lists(TOKEN, max_size=3), st.dictionaries(st.just("image_token"), NAME)),
    "additional_special_tokens": st.lists(TOKEN, max_size=3),
    "audio_token": NAME,
})  # fmt: skip
MAP = st.fixed_dictionaries(
    {"additional_special_tokens": st.lists(NAME, max_size=2)},
    optional={"eos_token": NAME, "pad_token": NAME, "video_token": NAME},
)
TEXTS = [*NAMES, "x <a> y<b>z  <B>  word swords <in> <über>.", " <s> <a><b></s>word-word <A> "]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    config=CONFIG, roles=ROLES,
    added=st.none() | st.dictionaries(NAME, st.integers(300, 400), max_size=3),
    map_=st.none() | MAP,
)  # fmt: skip
def test_ids_and_text_equal_those_of_auto_tokenizer(
    kind: str, config: dict[str, Any], roles: dict[str, Any], added: dict[str, int] | None, map_: dict[str, Any] | None
) -> None:
    from transformers import AutoTokenizer

    files = {"tokenizer_config": {**config, **roles}, "added_tokens": added, "special_tokens_map": map_}
    folder = Path(tempfile.mkdtemp())
    try:
        write(folder, kind, **{name: value for name, value in files.items() if value is not None})
        reference = AutoTokenizer.from_pretrained(folder)
        ours = load_tokenizer(folder)
    finally:
        shutil.rmtree(folder)
    assert ours.backend.get_added_tokens_decoder() == reference.added_tokens_decoder
    for text in TEXTS:
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == ids, text
        for skip in (False, True):
            if "\ufffd" not in (decoded := reference.decode(ids, skip_special_tokens=skip)):
                assert ours.decode(ids, skip_special_tokens=skip) == decoded
    assert ours.eos_token == (reference.eos_token or ours.eos_token)
    assert ours.bos_token == reference.bos_token


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"tokenizer_config": {"added_tokens_decoder": []}}, r"tokenizer_config\.json.*added_tokens_decoder"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}}, r"'x' is not a token id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"-1": {"content": "a"}}}}, r"'-1' is not a token id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": {"content": 5}}}}, r"added_tokens_decoder\.1 must be"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": None}}}, r"added_tokens_decoder\.1 must be"),
        ({"tokenizer_config": {"eos_token": {"content": "a", "lstrip": "yes"}}}, r"eos_token\.lstrip must be true or"),
        ({"tokenizer_config": {"eos_token": ["</s>"]}}, r"eos_token must be"),
        ({"tokenizer_config": {"extra_special_tokens": "<a>"}}, r"extra_special_tokens must be"),
        ({"tokenizer_config": {"extra_special_tokens": [1]}}, r"extra_special_tokens must be"),
        ({"tokenizer_config": {"eos_token": "\ud83d"}}, r"eos_token is not Unicode text"),
        ({"tokenizer_config": []}, r"tokenizer_config\.json.*(not a JSON object|must be an object)"),
        ({"tokenizer_config": {"chat_template": [{"name": 1}]}}, r"chat_template must be"),
        ({"tokenizer_config": {"chat_template": 7}}, r"chat_template must be"),
        ({"added_tokens": {"<a>": "x"}}, r"added_tokens\.json.*'x' is not a token id"),
        ({"special_tokens_map": "x"}, r"special_tokens_map\.json.*(not a JSON object|must be an object)"),
    ],
)
def test_malformed_files_are_refused_by_file_and_key(files: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=told):
        load_tokenizer(write(tmp_path, **files))


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "added_tokens"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"{", b"\xff"])
def test_files_that_are_no_json_are_refused_by_name(name: str, content: bytes, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / f"{name}.json").write_bytes(content)
    with pytest.raises(ModelError, match=name):
        load_tokenizer(tmp_path)


def test_a_template_that_is_not_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"chat_template\.jinja"):
        load_tokenizer(tmp_path)


def test_declared_special_tokens_are_left_out_of_text_and_protected_in_chats(tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {"300": {"content": "<end>", "special": True}}, "eos_token": "<end>",
              "chat_template": "{{ messages[0].content }}{{ eos_token }}"}  # fmt: skip
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_config=config))
    (end,) = tokenizer.encode("<end>", add_special_tokens=False)
    assert tokenizer.eos_token_ids == (end,)
    assert tokenizer.decode([end]) == ""
    assert tokenizer.encode_chat([{"role": "user", "content": "<end>"}]).count(end) == 1
