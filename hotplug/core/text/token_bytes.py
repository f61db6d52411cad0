"""How vocabularies spell bytes: GPT-2's alphabet, and SentencePiece's byte tokens such as <0x0A>."""

from __future__ import annotations

import itertools


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a token in GPT-2's alphabet; a token with any other character stands for itself."""
    try:
        return bytes(_BYTES[c] for c in token)
    except KeyError:
        return token.encode()


def with_valid_bytes(tokens: list[str]) -> list[str]:
    """Tokens with U+FFFD in the place of the byte tokens that spell no character."""
    kept: list[str] = []
    for is_byte, run in itertools.groupby(tokens, BYTE_TOKENS.__contains__):
        if is_byte:
            text = b"".join(BYTE_TOKENS[token] for token in run).decode(errors="replace")
            run = (one for c in text for one in ((c,) if c == "\ufffd" else (f"<0x{b:02X}>" for b in c.encode())))
        kept += run
    return kept


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_alphabet()
BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
