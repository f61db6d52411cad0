"""What the completions API says of tokens: where in the choice's text each begins (`text_offset`), and its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from hotplug.core.text.detokenizer import Detokenizer
from hotplug.server.stream import finite

if TYPE_CHECKING:
    from hotplug.core.logprobs import TokenLogprobs
    from hotplug.core.text.tokenizer import Tokenizer


class Offsets:
    """Counts the characters before each token of an output that goes on from `prompt_ids`.

    A token that is no text, as special tokens are that get left out, begins where the next one does. So do all parts
    of a character.
    """

    def __init__(
        self, tokenizer: Tokenizer, begin: int, *, skip_special_tokens: bool, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens, prompt_ids=prompt_ids)
        self._next = begin

    def of(self, token_id: int) -> int:
        begin = self._next
        self._next += len(self._detokenizer.push_token(token_id))
        return begin


def offsets_in(text: str, token_ids: Iterable[int], tokenizer: Tokenizer) -> list[int]:
    """Where in a text each of the tokens begins that it was made into; those that were added are not in it."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    found: list[int] = []
    at = 0
    for token_id in token_ids:
        found.append(at)
        if token_id in tokenizer.special_ids:
            piece = tokenizer.token_text(token_id)
            at += len(piece) if text.startswith(piece, at) else 0
            continue
        piece = detokenizer.push_token(token_id)
        if not text.startswith(piece, at) and text.startswith(bare := piece.removeprefix(" "), at):
            piece = bare  # a space that the tokenizer puts before a text
        at = min(at + len(piece), len(text))
    return found


def name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; bytes that are no whole characters as the OpenAI API writes them."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return _written_out(data)


def alternatives(tokenizer: Tokenizer, position: TokenLogprobs) -> dict[str, float]:
    """The best tokens by name, best first, and the chosen one. Of tokens with equal text the chosen one, or else the
    best, has the text for its name; the others are told by their bytes, or by their ids where these are equal too."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    for token_id in position.token_ids:  # the chosen one is the first
        if token_id in names:
            continue
        text = name(tokenizer, token_id)
        if text in taken:
            text = _written_out(tokenizer.token_bytes(token_id))
        if text in taken:
            text = f"token_id:{token_id}"
        names[token_id] = text
        taken.add(text)
    order = [*range(1, len(position.token_ids)), 0]
    return {names[position.token_ids[i]]: finite(position.logprobs[i]) for i in order}


def _written_out(data: bytes) -> str:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
