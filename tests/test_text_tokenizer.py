"""Tokenizers from GGUF metadata and from folders, token bytes, chat templates."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from hotplug.core.errors import ConfigError, ModelError, RequestError, UnsupportedModelError, WeightsError
from hotplug.core.text.gguf_tokenizer import build_tokenizer, score_merges
from hotplug.core.text.tokenizer import Tokenizer
from hotplug.core.text.tokenizer_files import load_tokenizer
from hotplug.core.weights.gguf_file import GgufFile

TEXTS = [
    "Hello, world!", "In 1984, 12345 + 67.89 = ?", "  spaces   and\n\n\tnew lines \n", "I'm sure you'll see IT'S",
    "Grüße aus Köln, 日本語テキスト", "🎉👩‍👩‍👧 emoji", "def f(x):\n    return x**2  # ok", "a  <|im_end|>  b", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> GgufFile:
    """A GGUF without tensors that holds `tokenizer.ggml.*` keys."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool}[type(value)](name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def byte_vocabulary(pre: str, **extra: Any) -> dict[str, Any]:
    """Every byte as a token, a few merges, and one control token at the end."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123", "ab", "Ġab", "<eos>"]
    merges = ["1 2", "12 3", "a b", "Ġ ab"]
    types = [1] * (len(tokens) - 1) + [3]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, "token_type": types,
            "eos_token_id": len(tokens) - 1, "bos_token_id": len(tokens) - 1} | extra  # fmt: skip


def pieces(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text, add_special_tokens=False).tokens


# --- against transformers -------------------------------------------------------------------------


def test_smollm2_tokens_equal_transformers(smollm2: Tokenizer, smollm2_path: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    for text in TEXTS:
        assert smollm2.encode(text) == reference(text)["input_ids"], text
    messages = [{"role": "user", "content": "Hi <b>&"}, {"role": "assistant", "content": "Yes?"}]
    assert smollm2.render_chat(messages) == reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_folder_tokenizer_equals_the_gguf_one(smollm2: Tokenizer, smollm2_hf_dir: Path) -> None:
    folder = load_tokenizer(smollm2_hf_dir)
    assert folder.encode_batch(TEXTS) == smollm2.encode_batch(TEXTS)
    assert folder.eos_token_ids == smollm2.eos_token_ids == (2,)
    assert folder.chat_template == smollm2.chat_template


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(text: str, smollm2: Tokenizer) -> None:
    assert smollm2.decode(smollm2.encode(text), skip_special_tokens=False) == text


def test_special_tokens_are_skipped_on_request(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("a<|im_end|>")
    assert (smollm2.decode(ids), smollm2.decode(ids, skip_special_tokens=False)) == ("a", "a<|im_end|>")
    assert smollm2.eos_token_ids[0] in smollm2.special_ids


@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_join_to_the_text(text: str, smollm2: Tokenizer) -> None:
    assert b"".join(map(smollm2.token_bytes, smollm2.encode(text))) == text.encode()


def test_half_a_character_shows_as_replacement_but_keeps_its_bytes(smollm2: Tokenizer) -> None:
    first = smollm2.encode("語")[0]
    assert "\ufffd" in smollm2.token_text(first)
    assert smollm2.token_bytes(first) == "語".encode()[: len(smollm2.token_bytes(first))]


def test_id_outside_the_vocabulary_has_no_text(smollm2: Tokenizer) -> None:
    beyond = smollm2.vocab_size + 5
    assert (smollm2.token_bytes(beyond), smollm2.decode([beyond])) == (b"", "")


def test_lone_surrogate_is_encoded_as_replacement(smollm2: Tokenizer) -> None:
    assert smollm2.encode("a\ud800b") == smollm2.encode("a\ufffdb")


# --- GGUF pre-tokenizers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["123", "4", "Ġab"]),
        ("smollm", ["1", "2", "3", "4", "Ġab"]),
        ("llama-bpe", ["123", "4", "Ġab"]),
        ("qwen2", ["1", "2", "3", "4", "Ġab"]),
    ],
)
def test_pre_tokenizers_split_digits_their_own_way(pre: str, expected: list[str], tmp_path: Path) -> None:
    tokenizer = build_tokenizer(write_vocabulary(tmp_path / "v.gguf", byte_vocabulary(pre)))
    assert pieces(tokenizer, "1234 ab") == expected


def test_unknown_pre_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    file = write_vocabulary(tmp_path / "v.gguf", byte_vocabulary("martian"))
    with pytest.raises(UnsupportedModelError, match=r"'martian'.*smollm"):
        build_tokenizer(file)


def test_unknown_tokenizer_model_is_refused_by_name(tmp_path: Path) -> None:
    file = write_vocabulary(tmp_path / "v.gguf", byte_vocabulary("gpt-2", model="bert"))
    with pytest.raises(UnsupportedModelError, match=r"'bert'.*gpt2, llama"):
        build_tokenizer(file)


def test_file_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no vocabulary"):
        build_tokenizer(write_vocabulary(tmp_path / "v.gguf", {"model": "gpt2"}))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ["ab"]),
        ({"add_bos_token": True}, ["<eos>", "ab"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<eos>", "ab", "<eos>"]),
    ],
)
def test_begin_and_end_tokens_are_added_as_the_metadata_says(
    flags: dict[str, bool], expected: list[str], tmp_path: Path
) -> None:
    tokenizer = build_tokenizer(write_vocabulary(tmp_path / "v.gguf", byte_vocabulary("gpt-2", **flags)))
    assert tokenizer.encode("ab").tokens == expected
    assert pieces(tokenizer, "ab") == ["ab"]


# --- SentencePiece --------------------------------------------------------------------------------

WORDS = ["▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁ab", "ca", "▁abc", "cab", "bb", "bbb"]


def sentencepiece_vocabulary(**extra: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *WORDS]
    scores = [0.0] * 259 + [-float(i) for i in random.Random(0).sample(range(len(WORDS)), len(WORDS))]
    return {"model": "llama", "tokens": tokens, "scores": scores, "token_type": [2, 3, 3] + [6] * 256
            + [1] * len(WORDS), "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | extra  # fmt: skip


def merge_best_first(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's definition: join the neighbours whose joint piece scores best, leftmost of equals."""
    parts = list(text)
    while True:
        joint = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not joint:
            return parts
        at = -max(joint)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_sentencepiece_merges_best_score_first(tmp_path: Path) -> None:
    vocabulary = sentencepiece_vocabulary()
    tokenizer = build_tokenizer(write_vocabulary(tmp_path / "v.gguf", vocabulary))
    scores = dict(zip(vocabulary["tokens"][259:], vocabulary["scores"][259:], strict=True))
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice("abc ") for _ in range(rng.randrange(1, 12)))
        assert pieces(tokenizer, text) == merge_best_first("▁" + text.replace(" ", "▁"), scores), text


def test_sentencepiece_spells_unknown_characters_in_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer(
        build_tokenizer(write_vocabulary(tmp_path / "v.gguf", sentencepiece_vocabulary())), special_tokens={}
    )
    ids = tokenizer.encode("aé", add_special_tokens=False)
    assert [tokenizer.token_bytes(i) for i in ids] == [b" a", b"\xc3", b"\xa9"]
    assert tokenizer.decode(ids) == "aé"


def test_sentencepiece_begins_with_bos_unless_told_not_to(tmp_path: Path) -> None:
    by_default = build_tokenizer(write_vocabulary(tmp_path / "a.gguf", sentencepiece_vocabulary()))
    off = build_tokenizer(write_vocabulary(tmp_path / "b.gguf", sentencepiece_vocabulary(add_bos_token=False)))
    assert (by_default.encode("a").tokens, off.encode("a").tokens) == (["<s>", "▁a"], ["▁a"])


def test_markers_of_a_file_are_special_and_its_words_are_whole(tmp_path: Path) -> None:
    vocabulary = sentencepiece_vocabulary()
    vocabulary["tokens"] += ["<turn>", "<word>"]
    vocabulary["scores"] += [0.0, 0.0]
    vocabulary["token_type"] += [3, 4]
    tokenizer = Tokenizer(build_tokenizer(write_vocabulary(tmp_path / "v.gguf", vocabulary)), special_tokens={})
    assert pieces(tokenizer.backend, "a<turn><word><unk>") == ["▁a", "<turn>", "<word>", "<unk>"]
    ids = tokenizer.encode("a<turn><word>")
    assert (tokenizer.decode(ids), tokenizer.decode(ids, False)) == ("a<word>", "<s> a<turn><word>")
    typed = tokenizer.encode_chat([{"role": "user", "content": "<turn></s>"}], template="<s>{{ messages[0].content }}")
    assert [i for i in typed if i in tokenizer.special_ids] == [1]


def test_no_marker_and_no_byte_token_is_made_of_text(tmp_path: Path) -> None:
    vocabulary = sentencepiece_vocabulary()
    vocabulary["tokens"] += ["<", "s>", "<0x41", ">"]
    vocabulary["scores"] += [-1.0] * 4
    vocabulary["token_type"] += [1] * 4
    plain = build_tokenizer(write_vocabulary(tmp_path / "v.gguf", vocabulary))
    plain.encode_special_tokens = True
    assert "<s>" not in pieces(plain, "a<s>")
    assert "<0x41>" not in pieces(plain, "a<0x41>")


def test_without_types_the_tokens_of_roles_are_markers_but_words_are_not(tmp_path: Path) -> None:
    vocabulary = {**byte_vocabulary("gpt-2"), "padding_token_id": 5}
    del vocabulary["token_type"]
    tokenizer = Tokenizer(build_tokenizer(write_vocabulary(tmp_path / "v.gguf", vocabulary)), special_tokens={})
    assert tokenizer.special_ids == {len(vocabulary["tokens"]) - 1}


def test_every_way_to_make_a_piece_is_a_merge() -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4}
    merges = score_merges(vocabulary, [0.0, 0.0, -2.0, -1.0, -3.0])
    assert merges == [("b", "a"), ("a", "b"), ("a", "ba"), ("ab", "a")]


# --- folders --------------------------------------------------------------------------------------


def write_folder(folder: Path, config: dict[str, Any] | None = None) -> Path:
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.enable_truncation(4)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return folder


def test_truncation_saved_in_a_tokenizer_is_off(tmp_path: Path) -> None:
    assert len(load_tokenizer(write_folder(tmp_path)).encode("long text")) == 9


def test_special_tokens_come_as_strings_or_objects(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    tokenizer = load_tokenizer(write_folder(tmp_path, config))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.eos_token_ids == (257,)


def test_named_templates_serve_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = load_tokenizer(write_folder(tmp_path, {"chat_template": named}))
    assert tokenizer.render_chat([]) == "plain"
    assert tokenizer.render_chat([], tools=[{"type": "function"}]) == "tools"


def test_template_file_wins_over_the_config(tmp_path: Path) -> None:
    write_folder(tmp_path, {"chat_template": "config"})
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).chat_template == "file"


def test_given_template_file_wins_over_all(tmp_path: Path) -> None:
    write_folder(tmp_path, {"chat_template": "config"})
    (tmp_path / "mine.jinja").write_text("mine")
    assert load_tokenizer(tmp_path, tmp_path / "mine.jinja").chat_template == "mine"


def test_given_template_file_that_is_no_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match=r"mine\.jinja: the chat template is not valid Jinja in line 1"):
        load_tokenizer(write_folder(tmp_path), tmp_path / "mine.jinja")


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer is there"):
        load_tokenizer(tmp_path)


def test_malformed_tokenizer_json_is_refused_by_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_folder_of_slow_files_is_converted(tmp_path: Path) -> None:
    vocabulary = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
    assert vocabulary["ab"] in tokenizer.encode("ab")


# --- chat templates -------------------------------------------------------------------------------


def chat(source: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    backend = tokenizers.Tokenizer(models.BPE({}, []))
    tokenizer = Tokenizer(backend, special_tokens={"bos_token": "<s>"}, templates={"default": source})
    return tokenizer.render_chat(messages or [{"role": "user", "content": "hi"}], **options)


def test_template_sees_special_tokens_and_variables() -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ mood }}{% if add_generation_prompt %}>{% endif %}"
    assert chat(template, mood="!") == "<s>hi!>"
    assert chat(template, add_generation_prompt=False) == "<s>hi"


def test_template_offers_what_hugging_faces_offers() -> None:
    assert chat("{{ '<é>' | tojson }}") == '"<é>"'
    assert chat("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}") == "1"
    assert len(chat("{{ strftime_now('%Y') }}")) == 4
    assert chat("{% generation %}{{ messages[0].role }}{% endgeneration %}") == "user"
    assert chat("{% if true %}\n  a\n{% endif %}\n") == "  a\n"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "a\nb"


def test_image_part_is_refused_by_its_type() -> None:
    with pytest.raises(RequestError, match="'image_url'") as caught:
        chat("", [{"role": "user", "content": [{"type": "image_url"}]}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content.x.y }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_template_failure_is_a_request_error(template: str) -> None:
    with pytest.raises(RequestError, match="chat template cannot render") as caught:
        chat(template)
    assert caught.value.param == "messages"


def test_template_of_a_request_that_does_not_compile_names_the_parameter() -> None:
    with pytest.raises(RequestError, match="not valid Jinja") as caught:
        chat("", template="{% for %}")
    assert caught.value.param == "chat_template"


def test_model_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--chat-template"):
        load_tokenizer(write_folder(tmp_path)).render_chat([])


def test_chat_is_encoded_without_a_second_bos(smollm2: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert smollm2.decode(smollm2.encode_chat(messages), False) == smollm2.render_chat(messages)
