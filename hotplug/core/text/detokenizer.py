"""Incremental text of one request: token ids in, text that is safe to send out, stop strings found.

Safe means: never half of a character, never the beginning of what may become a stop string. With no stop
string hit, all pieces joined equal `Tokenizer.decode` of all ids: of the prompt's and the output's together, less that
of the prompt's. A character that begins in the prompt and ends in the output comes whole with the output, where the
text of the prompt shows U+FFFD; bytes that never become a character are U+FFFD.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Collection, Sequence
from typing import Any, Protocol

from hotplug.core.text.tokenizer import Tokenizer

_CONTEXT = 8
"""Prompt tokens with text that a first output token's text may depend on."""


class Detokenizer:
    """Text of one request. `stopped` names the stop string that ended it.

    `prompt_ids` are what the output goes on from: its first token keeps the leading space that some tokenizers drop
    at the beginning of a text, and may end a character that the prompt begins. `keep` are special tokens that stay in
    the text although `skip_special_tokens`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        keep: Collection[int] = (),
    ) -> None:
        self.stopped: str | None = None
        self._stop = tuple(stop)
        self._stop_starts = {one[0] for one in self._stop}
        self._include_stop = include_stop
        self._held = ""
        skip = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        if keep:
            skip = skip.difference(keep)
        kind = _BytePieces if tokenizer.joins_bytes else _WindowPieces
        self._pieces: _Pieces = kind(tokenizer, skip, prompt_ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became safe to send with these tokens; "" after a stop string."""
        return "" if self.stopped is not None else self._release(self._pieces.push(token_ids))

    def push_token(self, token_id: int) -> str:
        """`push` of one token. Hot path."""
        if self.stopped is not None:
            return ""
        new = self._pieces.push_token(token_id)
        return self._release(new) if self._stop else new

    def finish(self) -> str:
        """The rest: what was held back for a character or a stop string that did not come."""
        if self.stopped is not None:
            return ""
        text = self._release(self._pieces.finish()) + self._held
        self._held = ""
        return text

    def _find(self, text: str) -> tuple[int, str] | None:
        """Begin and name of the stop string that ends it."""
        return _first_stop(text, self._stop)

    def _release(self, new: str) -> str:
        if not self._stop or (not self._held and self._stop_starts.isdisjoint(new)):
            return new
        text = self._held + new
        hit = self._find(text)
        if hit is not None:
            begin, self.stopped = hit
            self._held = ""
            return text[: begin + len(self.stopped)] if self._include_stop else text[:begin]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class LateStops(Detokenizer):
    """A detokenizer whose stop strings count where a token after the first `min_tokens` completes them."""

    def __init__(self, tokenizer: Tokenizer, *, min_tokens: int, stop: Sequence[str], **options: Any) -> None:
        """The other options are those of `Detokenizer`."""
        super().__init__(tokenizer, stop=stop, **options)
        self._early = min_tokens
        """Tokens to come that complete no stop string."""
        self._spent = 0
        """Characters of the text held back that come from such tokens."""

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.push_token, token_ids))

    def push_token(self, token_id: int) -> str:
        self._early -= 1
        return super().push_token(token_id)

    def _find(self, text: str) -> tuple[int, str] | None:
        return None if self._early >= 0 else _first_stop(text, self._stop, self._spent)

    def _release(self, new: str) -> str:
        before = len(self._held) + len(new)
        text = super()._release(new)
        released = before - len(self._held)
        self._spent = len(self._held) if self._early >= 0 else max(0, self._spent - released)
        return text


def _first_stop(text: str, stops: tuple[str, ...], spent: int = 0) -> tuple[int, str] | None:
    """Begin and name of the stop string that is complete first, so that chunking does not matter.

    The first `spent` characters complete none.
    """
    found = [
        (at + len(stop), at, stop) for stop in stops if (at := text.find(stop, max(0, spent + 1 - len(stop)))) >= 0
    ]
    return min(found)[1:] if found else None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


class _Pieces(Protocol):
    """Tokens to whole characters."""

    def push(self, token_ids: Sequence[int]) -> str: ...

    def push_token(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _BytePieces:
    """Byte-level BPE and SentencePiece: decoding is joining bytes, so one incremental UTF-8 decoder does it.

    While that holds no part of a character, a token of whole characters is looked up and not decoded.
    """

    __slots__ = ("_begun", "_decoder", "_plain", "_skip", "_strips", "_texts", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip: frozenset[int], prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._texts = tokenizer.whole_texts
        self._decoder = _utf8_decoder()
        self._begun = b""
        """Bytes of a character that the prompt begins, while the output has not gone on with it."""
        self._strips = tokenizer.strips_first_space
        """Whether a space that comes next is dropped."""
        self._begin(prompt_ids)
        self._plain = not self._begun and not self._strips
        """Whether nothing came before that the next token's text depends on."""

    def _begin(self, prompt_ids: Sequence[int]) -> None:
        """Take over what the end of the prompt means for the first token."""
        ending: list[int] = []
        for token_id in reversed(prompt_ids):
            if token_id in self._skip or (text := self._texts[token_id]) == "":
                continue
            self._strips = False
            if text is not None or len(ending) == _CONTEXT:
                break
            ending.append(token_id)
        if ending:
            self.push(ending[::-1])
            self._begun = self._decoder.getstate()[0]

    def push_token(self, token_id: int) -> str:
        if self._plain:
            text = self._texts[token_id]
            if text is not None:
                return "" if token_id in self._skip else text
        return self.push((token_id,))

    def push(self, token_ids: Sequence[int]) -> str:
        data = b"".join(self._tokenizer.token_bytes(t) for t in token_ids if t not in self._skip)
        if data and self._begun:
            if not _goes_on(self._begun, data):
                self._decoder.reset()
            self._begun = b""
        if data and self._strips:
            data = data.removeprefix(b" ")
            self._strips = False
        text = self._decoder.decode(data)
        self._plain = not self._strips and not self._decoder.getstate()[0]
        return text

    def finish(self) -> str:
        if self._begun:
            self._decoder.reset()
        return self._decoder.decode(b"", final=True)


class _WindowPieces:
    """Any other decoder: the text a token adds is the difference it makes to a short window before it.

    The window begins at the last emitted piece, so its cost does not grow with the text. Tokens without text do not
    enter it. Byte tokens are held until they end a character.
    """

    def __init__(self, tokenizer: Tokenizer, skip: frozenset[int], prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._tokens = tokenizer.tokens
        self._bytes = tokenizer.fallback_bytes
        self._decoder = _utf8_decoder()
        self._window: list[int] = []
        for token_id in reversed(prompt_ids):
            if token_id not in skip and self._tokens[token_id]:
                self._window.append(token_id)
                if len(self._window) == _CONTEXT:
                    break
        self._window.reverse()
        held = 0
        for token_id in self._window:
            held = self._take(self._bytes.get(token_id))
        self._begun: bytes = self._decoder.getstate()[0]
        """Bytes of a character that the prompt begins, while the output has not gone on with it."""
        self._emitted = len(self._window) - held
        self._before = tokenizer.decode(self._window[: self._emitted], False)

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.push_token, token_ids))

    def push_token(self, token_id: int) -> str:
        if token_id in self._skip or not self._tokens[token_id]:
            return ""
        byte = self._bytes.get(token_id)
        if self._begun:
            if byte is None or not _goes_on(self._begun, byte):
                self._emit_prompt()
            self._begun = b""
        self._window.append(token_id)
        return self._advance(len(self._window) - self._take(byte))

    def finish(self) -> str:
        return "" if self._begun else self._advance(len(self._window))

    def _take(self, byte: bytes | None) -> int:
        """How many byte tokens at the end belong to a character that has not ended."""
        if byte is None:
            self._decoder.reset()
            return 0
        self._decoder.decode(byte)
        return len(self._decoder.getstate()[0])

    def _emit_prompt(self) -> None:
        """The character that the prompt begins does not go on: it is the prompt's own."""
        self._emitted = len(self._window)
        self._before = self._tokenizer.decode(self._window, False)
        self._decoder.reset()

    def _advance(self, end: int) -> str:
        if end <= self._emitted:
            return ""
        text, before = self._tokenizer.decode(self._window[:end], False), self._before
        new = text[len(before) :] if text.startswith(before) else _after_common(before, text)
        if new:
            self._window = self._window[self._emitted :]
            self._emitted = end - self._emitted
            self._before = self._tokenizer.decode(self._window[: self._emitted], False)
        return new


def _after_common(before: str, text: str) -> str:
    """What of `text` comes after its common beginning with `before`."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False))
    return text[sum(1 for _ in same) :]


def _utf8_decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


def _goes_on(begun: bytes, data: bytes) -> bool:
    """Whether the character that `begun` begins may go on with the first of `data`."""
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(begun + data[:1])
    except UnicodeDecodeError:
        return False
    return True
