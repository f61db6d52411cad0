"""GGUF metadata -> a tokenizer of the `tokenizers` library: byte-level BPE ("gpt2"), SentencePiece BPE ("llama").

The metadata names the pre-tokenizer but does not hold it; the split patterns here are those of the models'
own tokenizer.json files. An unknown name is refused: a wrong split gives wrong tokens silently.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from hotplug.core.errors import UnsupportedModelError, WeightsError
from hotplug.core.weights.gguf_file import GgufFile
from hotplug.core.weights.limits import MOST_VOCAB
from hotplug.core.weights.metadata import brief
from hotplug.core.weights.token_ids import known_tokens

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
"""`tokenizer.ggml.token_type`: <unk>, markers such as <|im_end|>, words that must not be split, and <0x0A>."""
_ROLES = ("bos", "eos", "eot", "eom", "unknown", "padding")
"""Whose tokens are markers in a file without types."""

_LONGEST = 1024
"""Characters of a token. Merges of SentencePiece are found in the square of it."""

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_FAMILIES = {
    "default": "gpt2", "gpt-2": "gpt2", "smollm": "smollm", "llama-bpe": "llama3", "llama3": "llama3",
    "llama-v3": "llama3", "qwen2": "qwen2", "deepseek-r1-qwen": "qwen2",
}  # fmt: skip
"""`tokenizer.ggml.pre` -> pre-tokenizer."""


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer a GGUF file describes. Raises UnsupportedModelError and WeightsError."""
    kind = file.metadata.text("tokenizer.ggml.model", "", most=100)
    tokens = file.metadata.texts("tokenizer.ggml.tokens", most=MOST_VOCAB, longest=_LONGEST)
    if not tokens:
        raise WeightsError("the metadata holds no vocabulary", where=str(file.path))
    if kind == "gpt2":
        tokenizer = _byte_level(file, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(file, tokens)
    else:
        raise UnsupportedModelError(f"the GGUF tokenizer {kind!r} is not built", where=str(file.path),
                                    hint="Built: gpt2, llama.")  # fmt: skip
    _add_special(tokenizer, file, tokens)
    _add_post_processor(tokenizer, file, tokens)
    return tokenizer


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    name = file.metadata.text("tokenizer.ggml.pre", "default", most=100)
    if name not in _FAMILIES:
        raise UnsupportedModelError(f"the GGUF pre-tokenizer {name!r} is not built", where=str(file.path),
                                    hint=f"Built: {', '.join(sorted(_FAMILIES))}.")  # fmt: skip
    family = _FAMILIES[name]
    merges = file.metadata.texts("tokenizer.ggml.merges", most=MOST_VOCAB, longest=2 * _LONGEST + 1) or ()
    pairs = [_split_merge(m, file) for m in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=family == "llama3")
    except Exception as e:  # the library raises bare Exception
        raise WeightsError("tokenizer.ggml.merges do not fit the vocabulary", where=str(file.path), why=brief(e)) from e
    tokenizer = Tokenizer(model)
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(family)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(family: str) -> Any:
    if family in ("gpt2", "smollm"):
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if family == "gpt2":
            return byte_level
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    pattern = Regex(_LLAMA3_SPLIT if family == "llama3" else _QWEN2_SPLIT)
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


def _split_merge(merge: str, file: GgufFile) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        file.metadata.refuse("tokenizer.ggml.merges", "must hold pairs of tokens", merge)
    return left, right


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """SentencePiece BPE: the merge that yields the piece of the highest score goes first."""
    scores = file.metadata.array("tokenizer.ggml.scores", len(tokens))
    if scores is None:
        raise WeightsError("the metadata holds no score for each token", where=str(file.path))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = special_token(file, "unknown", len(tokens))
    model = models.BPE(
        vocab=vocabulary, merges=score_merges(vocabulary, scores, _unspelled(file, tokens)),
        unk_token=tokens[unknown or 0], fuse_unk=True, byte_fallback=True,
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    prefix = file.metadata.flag("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _unspelled(file: GgufFile, tokens: list[str]) -> set[int]:
    """Ids of the pieces that are not made of smaller ones: markers and bytes."""
    return _marks(file, tokens) | _of_type(file, tokens, _BYTE)


def score_merges(
    vocabulary: dict[str, int], scores: Sequence[float] | npt.NDArray[Any], unspelled: Collection[int] = ()
) -> list[tuple[str, str]]:
    """Every way to make a piece of two pieces, best score first (equal scores: the lower ids first)."""
    ranked = []
    for piece, token in vocabulary.items():
        if token in unspelled:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[token], vocabulary[left], vocabulary[right], left, right))
    ranked.sort(key=lambda entry: entry[:3])
    return [(left, right) for *_, left, right in ranked]


def special_token(file: GgufFile, role: str, vocab_size: int) -> int | None:
    """The id of a special token ("bos", "eos", "unknown", "padding"); None without one that the vocabulary has."""
    return next(iter(known_tokens([(file.metadata, f"tokenizer.ggml.{role}_token_id")], vocab_size)), None)


def _add_special(tokenizer: Tokenizer, file: GgufFile, tokens: list[str]) -> None:
    marks = _marks(file, tokens)
    words = [tokens[i] for i in sorted(_of_type(file, tokens, _USER_DEFINED) - marks)]
    tokenizer.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in sorted(marks)])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in words])


def _marks(file: GgufFile, tokens: list[str]) -> set[int]:
    """Ids of the tokens that no text spells: by type, or by role in a file without types."""
    if file.metadata.present("tokenizer.ggml.token_type"):
        return _of_type(file, tokens, _UNKNOWN, _CONTROL)
    ids = {i for role in _ROLES if (i := special_token(file, role, len(tokens))) is not None}
    return {i for i in ids if len(tokens[i]) > 2 and not tokens[i][0].isalnum()}  # a wrong id is a word


def _of_type(file: GgufFile, tokens: list[str], *types: int) -> set[int]:
    """Ids of the tokens of these types; none in a file without types."""
    found = file.metadata.array("tokenizer.ggml.token_type", len(tokens))
    return set() if found is None else set(np.flatnonzero(np.isin(found, types)).tolist())


def _add_post_processor(tokenizer: Tokenizer, file: GgufFile, tokens: list[str]) -> None:
    meta = file.metadata
    # What llama.cpp takes where the key is absent.
    pre = meta.text("tokenizer.ggml.pre", "", most=100)
    default = meta.text("tokenizer.ggml.model", most=100) == "llama" or _FAMILIES.get(pre) == "llama3"
    template, special = "$A", []
    for key, form, wanted in (
        ("bos", "{0} {1}", meta.flag("tokenizer.ggml.add_bos_token", default)),
        ("eos", "{1} {0}", meta.flag("tokenizer.ggml.add_eos_token", False)),
    ):
        token = special_token(file, key, len(tokens))
        if wanted and token is not None:
            template = form.format(f"[{key}]", template)
            special.append({"id": f"[{key}]", "ids": [token], "tokens": [tokens[token]]})
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
