"""Incremental text of one request: token ids in, text that is safe to send out, stop strings found.

Safe means: never half of a character, never the beginning of what may become a stop string. With no stop
string hit, all pieces joined equal `Tokenizer.decode` of all ids.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Protocol

from hotplug.core.text.tokenizer import Tokenizer

_CONTEXT = 8
"""Prompt tokens that a first output token's text may depend on."""


class Detokenizer:
    """Text of one request. `stopped` names the stop string that ended it.

    `prompt_ids`, if given, lets the first token keep its leading space in tokenizers that drop it at the
    beginning of a text (a completion continues its prompt; a chat answer begins anew).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self.stopped: str | None = None
        self._stop = tuple(stop)
        self._stop_starts = {one[0] for one in self._stop}
        self._include_stop = include_stop
        self._held = ""
        self._pieces: _Pieces = (
            _BytePieces(tokenizer, skip_special_tokens)
            if tokenizer.byte_level
            else _WindowPieces(tokenizer, skip_special_tokens, list(prompt_ids[-_CONTEXT:]))
        )

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
    """Byte-level BPE: decoding is joining bytes, so one incremental UTF-8 decoder does it.

    While that holds no part of a character, a token of whole characters is looked up and not decoded.
    """

    __slots__ = ("_decoder", "_holds_nothing", "_skip", "_texts", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._texts = tokenizer.whole_texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._holds_nothing = True

    def push_token(self, token_id: int) -> str:
        if self._holds_nothing:
            text = self._texts[token_id]
            if text is not None:
                return "" if token_id in self._skip else text
        return self.push((token_id,))

    def push(self, token_ids: Sequence[int]) -> str:
        data = b"".join(self._tokenizer.token_bytes(t) for t in token_ids if t not in self._skip)
        text = self._decoder.decode(data)
        self._holds_nothing = not self._decoder.getstate()[0]
        return text

    def finish(self) -> str:
        self._holds_nothing = True
        return self._decoder.decode(b"", final=True)


class _WindowPieces:
    """Any other decoder: the text a token adds is the difference it makes to a short window before it.

    Byte-fallback runs are held to their end, because whether one is valid UTF-8 decides over all of its
    bytes. The window begins at the last emitted piece, so its cost does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = context
        self._emitted = len(context)
        self._before = self._decode(context)

    def push(self, token_ids: Sequence[int]) -> str:
        self._window += token_ids
        end = len(self._window)
        while end > self._emitted and self._leaves_run_open(self._window[end - 1]):
            end -= 1
        return self._advance(end)

    def push_token(self, token_id: int) -> str:
        return self.push((token_id,))

    def finish(self) -> str:
        return self._advance(len(self._window))

    def _leaves_run_open(self, token_id: int) -> bool:
        """Whether a byte run may go on after this token: it is a byte, or decoding does not see it."""
        invisible = self._skip and token_id in self._tokenizer.special_ids
        return (
            invisible
            or self._tokenizer.fallback_byte(token_id) is not None
            or (self._tokenizer.backend.id_to_token(token_id) is None)
        )

    def _advance(self, end: int) -> str:
        text = self._decode(self._window[:end])[len(self._before) :]
        if text:
            self._window = self._window[self._emitted :]
            self._emitted = end - self._emitted
            self._before = self._decode(self._window[: self._emitted])
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
