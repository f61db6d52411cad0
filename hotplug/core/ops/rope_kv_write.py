"""Rotation and cache write in one: what a step's queries, keys and values go through before attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hotplug.core.ops.attention import functional_kv_write, kv_write
from hotplug.core.ops.registry import Bind, Fn, Op, SiteSpec
from hotplug.core.ops.rope import qk_norm_rope, rope


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope` of `q` and `k`, then `kv_write` of the rotated keys and `v`; the rotated queries and the caches."""
    q, k = rope(q, k, positions, cos_sin)
    return q, *kv_write(k, v, k_cache, v_cache, slots, layout)


def qk_norm_rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope`, then `kv_write`; the rotated queries and the caches."""
    q, k = qk_norm_rope(q, k, q_weight, k_weight, eps, positions, cos_sin)
    return q, *kv_write(k, v, k_cache, v_cache, slots, layout)


def _rope_then(rotate: Fn, write: Fn) -> Fn:
    """`rope_kv_write` of two callables, with its parameters: programs read an op's schema from the signature."""

    def composed(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        layout: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k = rotate(q, k, positions, cos_sin)
        return q, *write(k, v, k_cache, v_cache, slots, layout)

    return composed


def _qk_norm_rope_then(rotate: Fn, write: Fn) -> Fn:
    """`qk_norm_rope_kv_write` of two callables, with its parameters."""

    def composed(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        eps: float,
        positions: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        layout: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k = rotate(q, k, q_weight, k_weight, eps, positions, cos_sin)
        return q, *write(k, v, k_cache, v_cache, slots, layout)

    return composed


def _bind_write(bind: Bind, spec: SiteSpec) -> Fn:
    return bind("kv_write", "kv_write", num_kv_heads=spec["num_kv_heads"], head_dim=spec["head_dim"],
                block_size=spec["block_size"], layout=spec["layout"], kv_dtype=spec["kv_dtype"])  # fmt: skip


def _bind_rotate(bind: Bind, op: str, spec: SiteSpec) -> Fn:
    return bind(op, "rope", num_heads=spec["num_heads"], num_kv_heads=spec["num_kv_heads"],
                head_dim=spec["head_dim"], rotary_dim=spec["rotary_dim"])  # fmt: skip


def lower_rope_kv_write(bind: Bind, spec: SiteSpec) -> Fn:
    return _rope_then(_bind_rotate(bind, "rope", spec), _bind_write(bind, spec))


def lower_qk_norm_rope_kv_write(bind: Bind, spec: SiteSpec) -> Fn:
    return _qk_norm_rope_then(_bind_rotate(bind, "qk_norm_rope", spec), _bind_write(bind, spec))


def _rotated_and_caches(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of either op, whose arguments end with the caches, the slots and the layout."""
    k_cache, v_cache = rest[-4:-2]
    return torch.empty_like(q), torch.empty_like(k_cache), torch.empty_like(v_cache)


_FACTS = ("num_heads", "num_kv_heads", "head_dim", "rotary_dim", "block_size", "layout", "kv_dtype")

OPS = (
    Op(
        "rope_kv_write",
        rope_kv_write,
        facts=_FACTS,
        lower=lower_rope_kv_write,
        functional=_rope_then(rope, functional_kv_write),
        outline=_rotated_and_caches,
    ),
    Op(
        "qk_norm_rope_kv_write",
        qk_norm_rope_kv_write,
        facts=_FACTS,
        lower=lower_qk_norm_rope_kv_write,
        functional=_qk_norm_rope_then(qk_norm_rope, functional_kv_write),
        outline=_rotated_and_caches,
    ),
)
