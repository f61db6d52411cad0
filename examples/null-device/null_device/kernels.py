"""Kernels that compute nothing: each carries the token that a position holds to its result, by a view.

A position's hidden state is its token id in every element, an integer. Products, norms and attention hand it on, scores
have it in every column, and drawing a token is one step of `null_device.tokens`, whatever the temperature. So a step
costs the host what launching it would, and the tokens are right only if each came back to its own request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hotplug.vendor import AttentionInputs, Impl, SiteSpec
from null_device.clock import Clock
from null_device.graph import compute
from null_device.tokens import generator

NAME = "null_device"
Array = np.ndarray[Any, Any]


def kernels(clock: Clock) -> Sequence[Impl]:
    """The kernels of a device whose steps take the time of `clock`."""

    def prepare_step(
        token_ids: Tensor,
        rows: Tensor,
        query_start: Tensor,
        start: Tensor,
        last_tokens: Tensor,
        block_tables: Tensor,
        num_blocks: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The step's tokens, and the beginning of its time. No kernel here reads positions, slots or blocks."""
        requests = len(rows)
        clock.launch(len(token_ids) - requests)
        blocks = block_tables[:1, :num_blocks].expand(requests, num_blocks)
        tokens = compute(_complete, torch.empty(len(token_ids), dtype=torch.int64), token_ids, rows, last_tokens)
        return tokens, tokens, tokens, start, blocks

    fns = (prepare_step, embed, linear, silu_mul, linear_silu_mul, rms_norm, add_rms_norm, rope_kv_write,
           qk_norm_rope_kv_write, attention, moe_experts, logits, argmax, sample, sample_rows)  # fmt: skip
    plain = [Impl(fn.__name__, NAME, make=partial(_itself, fn)) for fn in fns]
    return [*plain, Impl("moe_route", NAME, make=moe_route)]


def _itself(fn: Callable[..., Any], spec: SiteSpec) -> Callable[..., Any]:
    """One function serves all call sites."""
    return fn


def embed(token_ids: Tensor, weight: Tensor) -> Tensor:
    return token_ids.unsqueeze(1).expand(-1, weight.shape[1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x[:, :1].expand(-1, weight.shape[0])


def silu_mul(gate_up: Tensor) -> Tensor:
    return gate_up[:, : gate_up.shape[1] // 2]


def linear_silu_mul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x[:, :1].expand(-1, weight.shape[0] // 2)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x, residual


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return q, k_cache, v_cache


def qk_norm_rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return q, k_cache, v_cache


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, sinks: Tensor | None) -> Tensor:
    return q


def moe_route(spec: SiteSpec) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    top_k = spec["top_k"]

    def route(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :top_k].to(torch.float32), torch.zeros(top_k, dtype=torch.int32).expand(len(x), -1)

    return route


def moe_experts(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return x


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The token in every column: [rows, vocab] without memory of its own."""
    scores = compute(_convert, torch.empty((len(hidden), 1), dtype=torch.float32), hidden[:, :1])
    return scores.expand(-1, weight.shape[0])


def argmax(logits: Tensor) -> Tensor:
    """Int64 [rows], the token after the one that the scores carry.

    Where something has changed the scores (penalties, biases, a grammar's mask), what most of them still are; a token
    that was made impossible is not given, but the first of the best.
    """
    if logits.stride(1) == 0 or not len(logits):
        return _follow(logits[:, 0], logits.shape[1])
    vocab = logits.shape[1]
    token = _follow(logits.amax(-1).clamp(0, vocab - 1), vocab)  # a bias may have raised them
    possible = logits.gather(1, token.unsqueeze(1)).squeeze(1) > float("-inf")
    return torch.where(possible, token, logits.argmax(-1))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor,
    counters: Tensor,
) -> Tensor:
    return argmax(logits)


def sample_rows(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    counters: Tensor,
) -> Tensor:
    return argmax(logits)


def _follow(scores: Tensor, vocab: int) -> Tensor:
    """Int64 [rows], the token after each that `scores` [rows] carry."""
    return compute(_look_up, torch.empty(len(scores), dtype=torch.int64), scores, _successors(vocab))


@cache
def _successors(vocab: int) -> Tensor:
    """Int64 [vocab], the token that follows each."""
    multiplier, increment = generator(vocab)
    return (torch.arange(vocab) * multiplier + increment) % vocab


def _complete(out: Array, given: Array, rows: Array, last: Array) -> None:
    """Given tokens, and where none is (-1), the row's last: decodes come first, so it stands at the row's own place."""
    out[:] = given
    first = out[: len(rows)]
    np.copyto(first, last[rows], where=first < 0)


def _convert(out: Array, source: Array) -> None:
    out[:] = source


def _look_up(out: Array, scores: Array, successors: Array) -> None:
    np.take(successors, scores.astype(np.int64), out=out, mode="clip")
