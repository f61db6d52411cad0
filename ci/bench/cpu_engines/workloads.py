"""What every engine of the CPU benchmark is asked: English text as token ids, a fresh stretch of it each time.

The text is that of Python's own help topics, so that nothing is fetched and all engines get the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TOKENS = 60_000
STRIDE = 1237
"""Between the stretches of two runs: no run finds a prefix of an earlier one cached."""


@dataclass(frozen=True)
class Asked:
    """Requests that arrive together."""

    prompts: list[list[int]]
    new_tokens: int


def text() -> str:
    """Python's help topics, one after another."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


class Source:
    """Hands out stretches of token ids, another one for each `run` of a workload that an engine is given."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._ids = encode(text())[:TOKENS]

    def take(self, offset: int, count: int) -> list[int]:
        """`count` ids from `offset` on, which may lie beyond the end."""
        begin = offset % (len(self._ids) - count)
        return self._ids[begin : begin + count]

    def w1(self, run: int) -> Asked:
        """One request: 128 in, 128 out."""
        return Asked([self.take(run * STRIDE, 128)], 128)

    def w2(self, run: int) -> Asked:
        """16 requests at once: 128 in, 64 out."""
        return Asked([self.take(run * STRIDE + i * 331, 128) for i in range(16)], 64)

    def w3(self, run: int) -> Asked:
        """16 requests at once that share 512 tokens, 16 of their own each, 32 out."""
        shared = self.take(run * STRIDE, 512)
        return Asked([shared + self.take(run * STRIDE + 5000 + i * 97, 16) for i in range(16)], 32)

    def w4(self, run: int) -> Asked:
        """One request of 1,024 tokens, 1 out."""
        return Asked([self.take(run * STRIDE, 1024)], 1)


WORKLOADS = ("w1", "w2", "w3", "w4")


def figures(workload: str, asked: Asked, times: list[list[float]]) -> dict[str, float]:
    """The figures of a workload, from the seconds at which each request's tokens came.

    Raises ValueError where a request got another number of tokens than it asked for.
    """
    if any(len(own) != asked.new_tokens for own in times) or len(times) != len(asked.prompts):
        raise ValueError(f"{workload}: {[len(own) for own in times]} tokens instead of {asked.new_tokens} each")
    first, last = min(own[0] for own in times), max(own[-1] for own in times)
    match workload:
        case "w1":
            return {"ttft_ms": first * 1e3, "decode_tok_s": (asked.new_tokens - 1) / (last - first)}
        case "w4":
            return {"prompt_tok_s": len(asked.prompts[0]) / first}
    return {"out_tok_s": sum(map(len, times)) / last}


FIGURES: tuple[tuple[str, str, str, Any], ...] = (
    ("w1", "ttft_ms", "W1 TTFT ms", min), ("w1", "decode_tok_s", "W1 decode tok/s", max),
    ("w2", "out_tok_s", "W2 out tok/s", max), ("w3", "out_tok_s", "W3 out tok/s", max),
    ("w4", "prompt_tok_s", "W4 prompt tok/s", max),
)  # fmt: skip
"""Workload, figure, its name in the table, and which of two values is better."""
