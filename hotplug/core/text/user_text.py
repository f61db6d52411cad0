"""The text of users stays text: what their strings spell like control tokens is encoded letter by letter.

A chat template writes control tokens as text among the strings of messages and tools, so a user who types `<|im_end|>`
would end his turn. Here one letter of each such spelling in a user's string is exchanged, before the template runs, for
a private-use character that nobody else uses. Whatever of the rendered text spells a control token then is the
template's. The text is encoded by a second tokenizer (it shares the model) that knows the control tokens under secret
names only: the template's are renamed, the users' are not tokens to it.

Control tokens are the special ones, and those others that the template writes around the turns of a plain conversation.
Tokens such as `<think>` and `<tool_call>` that are neither stay tokens: models answer with them as text, templates look
for them in messages, and an answer that comes back as history has to give the ids that it was made of.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Iterable, Iterator
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken, models

from hotplug.core.errors import ModelError, RequestError
from hotplug.core.text.json_scan import LONE_SURROGATE

_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
_NOTHING = "\U0010ffff"
"""No character: stands in a string that is searched again for a letter that is to be exchanged."""
_MAX_GAP = 1 << 20
_PREFIX = 4
"""Letters of a control token that a string is searched for first."""
_BATCH = 10_000
"""Characters from which the tokenizer is called in its own threads, without Python's lock."""


class UserText:
    """Encodes conversations over one tokenizer and one set of control tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, control: Iterable[str], seams: Iterable[str] = ()) -> None:
        """`control` are texts of added tokens of `backend`; `seams` are texts at which the template may cut strings."""
        added = backend.get_added_tokens_decoder()
        self._control = {text for text in control if text.strip()}
        own = [token for _, token in sorted(added.items())]
        found = [token for token in own if token.content in self._control]
        self._first = tuple({text[0] for text in self._control})
        self._starts = tuple({text[:_PREFIX] for text in self._control})
        self._normalized = backend.normalizer is not None and any(token.normalized for token in found)
        edged = [text for text in self._control if not text[0].isalnum()]
        self._beginnings = {text[:size] for text in edged for size in range(1, len(text))}
        self._longest = max(map(len, self._control), default=1)
        self._reach = max(map(len, edged), default=1) - 1
        self._seams = tuple(text for text in seams if text.strip() and not text[0].isalnum())
        # Finds spellings in a string of a user: wherever they are, whatever stands beside them.
        self._spellings = _finder(backend, [AddedToken(t.content, normalized=t.normalized) for t in found])
        self._tokens = _finder(backend, own)
        self._control_ids = {self._tokens.token_to_id(text): text for text in self._control}
        self._secret = secrets.token_hex(8)
        self._encoder, self._ids = self._second_tokenizer(backend, own)

    def _second_tokenizer(
        self, backend: tokenizers.Tokenizer, own: list[AddedToken]
    ) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The tokenizer with renamed control tokens, and its ids in terms of `backend`'s."""
        names = {t.content: self._secret + t.content if t.content in self._control else t.content for t in own}
        renamed = [
            AddedToken(names[t.content], single_word=t.single_word, lstrip=t.lstrip, rstrip=t.rstrip,
                       normalized=t.normalized and t.content not in self._control)
            for t in own
        ]  # fmt: skip
        encoder = _like(backend, backend.model, renamed)
        spelled = {t for t in self._control if t in encoder.encode(t, add_special_tokens=False).tokens}
        if spelled:  # the model itself makes control tokens of text, as Unigram models do
            encoder = _like(backend, _model_without(backend, spelled, self._secret), renamed)
        ids = {encoder.token_to_id(name): backend.token_to_id(text) for text, name in names.items()}
        return encoder, cast(dict[int, int], ids)

    # --- before the template ----------------------------------------------------------------------

    def mark(self, values: Any) -> tuple[Any, dict[int, str]] | None:
        """`values` (nested dicts, lists and strings) with spellings broken; None where there are none to break.

        The second part gives, by code point, the letters to put back. Raises RequestError.
        """
        strings = _strings(values)
        suspects = strings if self._normalized else self._with_first_letters(strings)
        if not suspects:
            return None
        marks = self._spelled(suspects if self._normalized else filter(self._may_spell, suspects))
        for text in suspects:
            if places := self._begun(text):
                marks.setdefault(text, set()).update(places)
        if not marks:
            return None
        free = _unused(strings)
        stand_ins: dict[str, str] = {}
        broken = {}
        for text, places in marks.items():
            letters = list(text)
            for place in places:
                letter = letters[place]
                if letter not in stand_ins:
                    stand_ins[letter] = next(free)
                letters[place] = stand_ins[letter]
            broken[text] = "".join(letters)
        try:
            marked = _replaced(values, broken)
        except RecursionError as e:
            raise RequestError("messages or tools are nested too deep", param="messages") from e
        return marked, {ord(stand_in): letter for letter, stand_in in stand_ins.items()}

    def _with_first_letters(self, strings: list[str]) -> list[str]:
        """Strings that are worth a closer look: cheap, as most are not."""
        if len(self._first) == 1:
            (letter,) = self._first
            return [text for text in strings if letter in text]
        return [text for text in strings if any(letter in text for letter in self._first)]

    def _may_spell(self, text: str) -> bool:
        return any(start in text for start in self._starts)

    def _spelled(self, texts: Iterable[str]) -> dict[str, set[int]]:
        """By string: places of letters without which no control token is spelled, not even overlapping ones."""
        marks: dict[str, set[int]] = {}
        for text in texts:
            letters, found = text, self._places(text)
            while new := found - marks.setdefault(text, set()):
                marks[text] |= new
                changed = list(letters)
                for place in new:
                    changed[place] = _NOTHING
                letters = "".join(changed)
                found = self._places(letters)
        return {text: places for text, places in marks.items() if places}

    def _places(self, text: str) -> set[int]:
        """A place in each spelling. Long texts are read in parts, so that no single call takes long."""
        places: set[int] = set()
        for begin in range(0, len(text), _BATCH):
            part = text[begin : begin + _BATCH + self._longest]
            encoding = self._spellings.encode(_one_by_one(part), add_special_tokens=False)
            spans = (span for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i)
            places.update(begin + _letter_of(part, *span) for span in spans)
        return places

    def _begun(self, text: str) -> set[int]:
        """Places of the last letters of what may become a control token with what the template puts after it."""
        ends = [len(text)]
        for seam in self._seams:
            ends += [found.start() for found in re.finditer(re.escape(seam), text)] if seam in text else []
        return {at - 1 for end in ends for at in {end, _before_blanks(text, end)} if self._begins_one(text, at)}

    def _begins_one(self, text: str, end: int) -> bool:
        tail = text[max(end - self._reach, 0) : end]
        return any(tail[i:] in self._beginnings for i, c in enumerate(tail) if c in self._first)

    # --- after the template -----------------------------------------------------------------------

    def encode(self, rendered: str, letters: dict[int, str]) -> list[int]:
        """Token ids of what a template made of marked values."""
        rendered = encodable(rendered)
        for code in letters:  # a template that wants JSON in ASCII has written escapes
            rendered = rendered.replace(json.dumps(chr(code))[1:-1], chr(code))
        parts: list[str] = []
        at = 0
        encoding = _encode(self._tokens, _one_by_one(rendered))
        for token_id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            text = self._control_ids.get(token_id)
            if text is not None:  # found with the blanks that it takes in, or in the normalizer's form
                place = rendered.find(text, begin, end)
                begin, end = (begin, end) if place < 0 else (place, place + len(text))
                parts += [rendered[at:begin], self._secret, text]
                at = end
        text = "".join([*parts, rendered[at:]]).translate(letters)
        encoding = _encode(self._encoder, text)
        return [self._ids.get(i, i) for i in encoding.ids]


def _finder(backend: tokenizers.Tokenizer, added: list[AddedToken]) -> tokenizers.Tokenizer:
    """A tokenizer that finds added tokens and nothing else: all other text has id 0."""
    finder = tokenizers.Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    return _with_parts(finder, backend.normalizer, None, added)


def _like(backend: tokenizers.Tokenizer, model: models.Model, added: list[AddedToken]) -> tokenizers.Tokenizer:
    return _with_parts(tokenizers.Tokenizer(model), backend.normalizer, backend.pre_tokenizer, added)


def _with_parts(
    tokenizer: tokenizers.Tokenizer, normalizer: Any, pre_tokenizer: Any, added: list[AddedToken]
) -> tokenizers.Tokenizer:
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    model = tokenizer.model
    room = tokenizer.get_vocab_size()
    if any(model.id_to_token(i) is not None for i in range(room, room + len(added))):
        highest = max(tokenizer.get_vocab().values())  # a vocabulary with gaps: new ids must not be the model's
        if highest - room > _MAX_GAP:
            raise ModelError("the tokenizer's ids leave too wide a gap", why=f"{room} tokens up to id {highest}")
        tokenizer.add_tokens([f"{secrets.token_hex(8)}" for _ in range(room, highest + 1)])
    tokenizer.add_tokens(added)
    return tokenizer


def _model_without(backend: tokenizers.Tokenizer, texts: set[str], secret: str) -> models.Model:
    """The model of `backend` with these tokens under names that no text spells; all ids stay."""
    settings = json.loads(backend.to_str())
    model = settings["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {secret + t if t in texts else t: i for t, i in model["vocab"].items()}
    else:
        model["vocab"] = [[secret + t if t in texts else t, score] for t, score in model["vocab"]]
    if model.get("unk_token") in texts:
        model["unk_token"] = secret + model["unk_token"]
    if "merges" in model:
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if texts.isdisjoint((a, b, a + b))]
    alone = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
             "decoder": None, "truncation": None, "padding": None, "model": model}  # fmt: skip
    return tokenizers.Tokenizer.from_str(json.dumps(alone)).model


def encodable(text: str) -> str:
    """Text with surrogate pairs joined and lone halves, which UTF-8 cannot carry, replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _one_by_one(text: str) -> str:
    """An encodable text with as many letters, for spans to be the same."""
    return text if text.isascii() else LONE_SURROGATE.sub("\ufffd", text)


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    if len(text) < _BATCH:
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode_batch([text], add_special_tokens=False)[0]


def _before_blanks(text: str, end: int) -> int:
    while end and text[end - 1].isspace():
        end -= 1
    return end


def _letter_of(text: str, begin: int, end: int) -> int:
    """The place of a letter to exchange: one that no template trims and JSON does not escape, if there is one."""
    plain = (i for i in range(begin, end) if text[i].isalnum())
    other = (i for i in range(begin, end) if not text[i].isspace() and text[i] not in ('"', "\\", _NOTHING))
    return next(plain, next(other, begin))


def _unused(strings: list[str]) -> Iterator[str]:
    """Private-use characters that occur in none of these strings, as such or as JSON escapes. Raises RequestError."""
    used = {c for text in strings if not text.isascii() for c in _PRIVATE.findall(text)}
    escaped = [text for text in strings if "\\ud" in text]
    for c in map(chr, itertools.chain(range(0x10FFFD, 0xFFFFF, -1), range(0xFFFFD, 0xEFFFF, -1))):
        if c not in used and not any(json.dumps(c)[1:-1] in text for text in escaped):
            yield c
    raise RequestError("messages use up all private-use characters of Unicode beside the text of special tokens",
                       param="messages")  # fmt: skip


def _strings(values: Any) -> list[str]:
    """All strings in nested dicts, lists and tuples, keys included."""
    found, todo = [], [values]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            found += [key for key in value if isinstance(key, str)]
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
    return found


def _replaced(values: Any, by: dict[str, str]) -> Any:
    if isinstance(values, str):
        return by.get(values, values)
    if isinstance(values, dict):
        return {_replaced(key, by): _replaced(value, by) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_replaced(value, by) for value in values]
    return values
