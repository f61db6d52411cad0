"""Streaming text: whole characters only, stop strings however the tokens are cut, the same text in the end."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from hotplug.core.text.detokenizer import Detokenizer, LateStops
from hotplug.core.text.tokenizer import Tokenizer
from hotplug.core.text.tokenizer_files import load_tokenizer


@pytest.fixture(scope="module")
def byte_level(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


def sentencepiece_like() -> Tokenizer:
    """Llama 2's decoder over a toy vocabulary: words, byte tokens, two special and one added token."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁a", "b", "▁▁", "é", "▁日", "<0xZZ>"]
    backend = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens(["<tool>"])
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"})


def metaspace_like() -> Tokenizer:
    """A Unigram model's decoder, which is not joined bytes, over the same words."""
    tokenizer = sentencepiece_like()
    backend = tokenizer.backend
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "always")])
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"})


def byte_level_like() -> Tokenizer:
    """Every byte, a few words, a special token, and an added one spelled with letters of GPT-2's alphabet."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "ab", "ÃŃ", "ðŁİ"]
    backend = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.add_tokens(["für"])
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"})


SENTENCEPIECE = sentencepiece_like()
KINDS = {"sentencepiece": SENTENCEPIECE, "metaspace": metaspace_like(), "byte-level": byte_level_like()}
CHUNKS = st.lists(st.integers(0, 5), min_size=1, max_size=40)


def stream(detokenizer: Detokenizer, ids: list[int], sizes: list[int]) -> str:
    """Text of `ids` pushed in chunks of `sizes`, single tokens and the rest by `push_token`."""
    text, at = "", 0
    for size in sizes:
        chunk = ids[at : at + size]
        text += detokenizer.push_token(chunk[0]) if len(chunk) == 1 else detokenizer.push(chunk)
        at += size
    for token in ids[at:]:
        text += detokenizer.push_token(token)
    return text + detokenizer.finish()


@settings(max_examples=300, deadline=None)
@given(data=st.data(), sizes=CHUNKS, skip=st.booleans())
def test_byte_level_stream_equals_decoding_all_at_once(
    byte_level: Tokenizer, data: st.DataObject, sizes: list[int], skip: bool
) -> None:
    token = st.one_of(st.integers(0, 300), st.integers(0, byte_level.vocab_size + 10))
    ids = data.draw(st.lists(token, max_size=60))
    text = stream(Detokenizer(byte_level, skip_special_tokens=skip), ids, sizes)
    assert text == byte_level.decode(ids, skip_special_tokens=skip)


@settings(max_examples=500, deadline=None)
@given(
    ids=st.lists(
        st.one_of(st.integers(0, SENTENCEPIECE.vocab_size + 2), st.integers(259, 270), st.just(2),
                  st.sampled_from([3 + 0xC3, 3 + 0xA9])),
        max_size=40,
    ),
    sizes=CHUNKS,
    skip=st.booleans(),
)  # fmt: skip
def test_sentencepiece_stream_equals_decoding_all_at_once(ids: list[int], sizes: list[int], skip: bool) -> None:
    text = stream(Detokenizer(SENTENCEPIECE, skip_special_tokens=skip), ids, sizes)
    assert text == SENTENCEPIECE.decode(ids, skip_special_tokens=skip)


def test_half_a_character_is_held_back(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("🎉")
    detokenizer = Detokenizer(byte_level)
    assert [detokenizer.push([t]) for t in ids] == [""] * (len(ids) - 1) + ["🎉"]


def test_a_looked_up_token_comes_after_the_character_that_it_breaks_off(byte_level: Tokenizer) -> None:
    half, word = byte_level.encode("🎉")[0], byte_level.encode("word")[0]
    detokenizer = Detokenizer(byte_level)
    assert detokenizer.push_token(word) == "word"  # looked up
    assert detokenizer.push_token(half) == ""
    assert detokenizer.push_token(word) == "\ufffdword"


def test_a_tokens_text_is_known_only_if_it_is_whole_characters(byte_level: Tokenizer) -> None:
    texts = byte_level.whole_texts
    halves = byte_level.encode("🎉")
    assert texts[byte_level.encode(" two")[0]] == " two"
    assert texts[halves[0]] is None
    assert texts[byte_level.vocab_size + 5] == ""


def test_character_cut_off_at_the_end_is_replaced(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level)
    assert detokenizer.push(byte_level.encode("🎉")[:1]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_text_is_sent_as_soon_as_it_is_safe(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, stop=["###"])
    assert [detokenizer.push([t]) for t in byte_level.encode("one two")] == ["one", " two"]


def test_sentencepiece_keeps_the_space_after_a_prompt() -> None:
    a, b = (SENTENCEPIECE.backend.token_to_id(t) for t in ("▁a", "b"))
    assert Detokenizer(SENTENCEPIECE).push([a]) == "a"
    assert Detokenizer(SENTENCEPIECE, prompt_ids=[b, b]).push([a]) == " a"


# --- after a prompt -------------------------------------------------------------------------------


def characters(kind: str, text: str) -> list[int]:
    """Token ids of a text, each byte of it a token."""
    backend = KINDS[kind].backend
    if kind == "byte-level":
        names = [*map(chr, [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)])]
        rest = [b for b in range(256) if chr(b) not in names]
        alphabet = {ord(c): c for c in names} | {b: chr(0x100 + i) for i, b in enumerate(rest)}
        return [backend.token_to_id(alphabet[b]) for b in text.encode()]
    return [backend.token_to_id(f"<0x{b:02X}>") for b in text.encode()]


def dangling(data: bytes) -> bytes:
    """What a text of bytes ends with that may still become a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return decoder.getstate()[0]


def is_begun(data: bytes) -> bool:
    """Whether these bytes are a character or may become one."""
    try:
        data.decode()
    except UnicodeDecodeError as e:
        return e.reason == "unexpected end of data"
    return True


WORDS = ["🎉", "é", "\u200b", "e\u0301", "\ufffd", "x", " "]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=400, deadline=None)
@given(data=st.data(), sizes=CHUNKS, skip=st.booleans())
def test_output_is_what_it_adds_to_the_prompt(kind: str, data: st.DataObject, sizes: list[int], skip: bool) -> None:
    tokenizer = KINDS[kind]
    one = st.integers(0, tokenizer.vocab_size + 3).map(lambda token: [token])
    word = st.sampled_from(WORDS).map(lambda text: characters(kind, text))
    ids = [token for part in data.draw(st.lists(st.one_of(one, word), max_size=16)) for token in part]
    at = data.draw(st.integers(0, len(ids)))
    got = stream(Detokenizer(tokenizer, prompt_ids=ids[:at], skip_special_tokens=skip), ids[at:], sizes)

    def data_of(ids: list[int]) -> bytes:
        return b"".join(tokenizer.token_bytes(i) for i in ids if not (skip and i in tokenizer.special_ids))

    begun, rest = dangling(data_of(ids[:at])), data_of(ids[at:])
    before = len(tokenizer.decode(ids[:at], skip))
    if begun and rest and is_begun(begun + rest[:1]):
        before -= 1  # the U+FFFD that stands for what the output goes on with
    assert got == tokenizer.decode(ids, skip)[before:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_the_prompt_begins_is_ended_and_nothing_after_it_is_lost(kind: str, cut: int) -> None:
    ids = characters(kind, "🎉xyz hello")
    for detokenizer in (
        Detokenizer(KINDS[kind], prompt_ids=ids[:cut]),
        Detokenizer(KINDS[kind], prompt_ids=[0, *ids[:cut]]),
    ):
        pieces = [detokenizer.push_token(token) for token in ids[cut:]]
        assert "".join(pieces) == "🎉xyz hello"
        assert pieces[3 - cut] == "🎉"


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_that_the_prompt_begins_and_the_output_does_not_end_is_the_prompts(kind: str) -> None:
    begun, word = characters(kind, "🎉")[:3], characters(kind, "x")
    assert stream(Detokenizer(KINDS[kind], prompt_ids=begun), word, []) == "x"
    assert stream(Detokenizer(KINDS[kind], prompt_ids=begun), [], []) == ""
    assert stream(Detokenizer(KINDS[kind], prompt_ids=begun[:2]), begun[2:] + word, []) == "\ufffdx"
    assert stream(Detokenizer(KINDS[kind], prompt_ids=begun[:2]), begun[2:], []) == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_characters_come_as_they_end_and_outlive_one_that_does_not(kind: str) -> None:
    detokenizer = Detokenizer(KINDS[kind], prompt_ids=characters(kind, "x"))
    first, second = characters(kind, "🎉"), characters(kind, "🎉")[:2]
    assert [detokenizer.push_token(token) for token in first] == ["", "", "", "🎉"]
    assert detokenizer.push(second) + detokenizer.finish() == "\ufffd"
    assert KINDS[kind].decode(first + second) == "🎉\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_without_text_change_nothing(kind: str) -> None:
    tokenizer = KINDS[kind]
    eos, beyond = tokenizer.eos_token_ids[0], tokenizer.vocab_size + 7
    first, *rest = characters(kind, "é")
    detokenizer = Detokenizer(tokenizer, prompt_ids=[eos] * 5000)
    assert [detokenizer.push_token(token) for token in (eos, first, beyond, eos, *rest, eos)] == [""] * 4 + ["é", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_a_space_is_kept_however_far_back_the_prompts_text_is(kind: str) -> None:
    tokenizer = KINDS[kind]
    word = tokenizer.backend.token_to_id("Ġa" if kind == "byte-level" else "▁a")
    special = list(tokenizer.eos_token_ids) * 100
    assert Detokenizer(tokenizer, prompt_ids=[*characters(kind, "x"), *special]).push([word]) == " a"
    assert Detokenizer(tokenizer, prompt_ids=special).push([word]) == tokenizer.decode([word])


def test_a_special_token_that_is_kept_is_text() -> None:
    eos = SENTENCEPIECE.eos_token_ids[0]
    assert Detokenizer(SENTENCEPIECE, keep=[eos]).push([1, eos]) == "</s>"


def test_an_added_token_is_its_own_text_whatever_its_letters() -> None:
    tokenizer = KINDS["byte-level"]
    (token,) = tokenizer.encode("für")
    assert (tokenizer.decode([token]), tokenizer.token_text(token)) == ("für", "für")
    assert Detokenizer(tokenizer).push([token]) == "für"


# --- stop strings ---------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab#", max_size=30), stops=st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3),
    sizes=CHUNKS, include=st.booleans(),
)  # fmt: skip
def test_stop_cuts_where_a_reader_of_single_characters_would(
    byte_level: Tokenizer, text: str, stops: list[str], sizes: list[int], include: bool
) -> None:
    expected = text
    for end in range(len(text) + 1):
        hits = [s for s in stops if text[:end].endswith(s)]
        if hits:
            expected = text[: end if include else end - max(map(len, hits))]
            break
    ids = [byte_level.backend.token_to_id(c) for c in text]
    detokenizer = Detokenizer(byte_level, stop=stops, include_stop=include)
    assert stream(detokenizer, ids, sizes) == expected
    assert (detokenizer.stopped is not None) == any(s in text for s in stops)


def test_stop_string_that_spans_tokens_is_never_half_sent(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, stop=["STOP"])
    pieces = [detokenizer.push([byte_level.backend.token_to_id(c)]) for c in "goSTOP"]
    assert (pieces, detokenizer.stopped) == (["g", "o", "", "", "", ""], "STOP")


def test_nothing_comes_after_a_stop(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, stop=["two"])
    assert detokenizer.push(byte_level.encode("one two three")) == "one "
    assert (detokenizer.push(byte_level.encode(" four")), detokenizer.finish()) == ("", "")


def test_false_alarm_is_released_at_the_end(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, stop=["STOP"])
    assert detokenizer.push(byte_level.encode("goST")) + detokenizer.finish() == "goST"
    assert detokenizer.stopped is None


def test_stop_string_in_the_last_replacement_is_found(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, stop=["\ufffd"])
    assert detokenizer.push(byte_level.encode("🎉")[:1]) + detokenizer.finish() == ""
    assert detokenizer.stopped == "\ufffd"


def as_vllm_stops(texts: list[str], stops: tuple[str, ...], min_tokens: int) -> tuple[str, str | None]:
    """Text and stop string of tokens with these `texts`: the first that a token after `min_tokens` completes."""
    text = ""
    for count, new in enumerate(texts, 1):
        before, text = len(text), text + new
        if count > min_tokens:
            ends = [(at + len(s), at, s) for s in stops for at in range(len(text)) if text.startswith(s, at)]
            hits = [hit for hit in ends if hit[0] > before]
            if hits:
                _, at, stop = min(hits)
                return text[:at], stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["a", "b"]), max_size=20),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    min_tokens=st.integers(1, 12),
    sizes=CHUNKS,
)
def test_stop_strings_count_after_min_tokens_however_chunked(
    byte_level: Tokenizer, pieces: list[str], stops: list[str], min_tokens: int, sizes: list[int]
) -> None:
    token = {text: byte_level.encode(text)[0] for text in "ab"}
    detokenizer = LateStops(byte_level, min_tokens=min_tokens, stop=tuple(stops))
    text = stream(detokenizer, [token[piece] for piece in pieces], sizes)
    assert (text, detokenizer.stopped) == as_vllm_stops(pieces, tuple(stops), min_tokens)


def test_a_stop_string_that_began_before_min_tokens_counts(byte_level: Tokenizer) -> None:
    a, b = (byte_level.encode(text)[0] for text in "ab")
    detokenizer = LateStops(byte_level, min_tokens=2, stop=("bab",))
    assert [detokenizer.push_token(t) for t in (a, b, a)] == ["a", "", ""]
    assert detokenizer.push_token(b) == ""
    assert detokenizer.stopped == "bab"


def test_a_character_of_several_tokens_counts_with_its_last(byte_level: Tokenizer) -> None:
    first, *rest = byte_level.encode("🦀")
    assert rest
    for min_tokens, stopped in ((len(rest), "🦀"), (len(rest) + 1, None)):
        detokenizer = LateStops(byte_level, min_tokens=min_tokens, stop=("🦀",))
        text = stream(detokenizer, [first, *rest], [])
        assert (text, detokenizer.stopped) == (("", "🦀") if stopped else ("🦀", None))


def test_what_is_held_back_to_the_end_within_min_tokens_is_text() -> None:
    ids = [SENTENCEPIECE.backend.token_to_id("<0x61>")] * 2
    detokenizer = LateStops(SENTENCEPIECE, min_tokens=2, stop=("aa",))
    assert stream(detokenizer, ids, []) == "aa"
    assert detokenizer.stopped is None
