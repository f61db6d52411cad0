"""Rotation and cache write in one: what a step's queries, keys and values go through before attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hotplug.core.ops.attention import functional_kv_write, kv_write
from hotplug.core.ops.registry import Bind, Fact, Fn, Op, SiteSpec
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


def functional_rope_kv_write(
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
    """`rope_kv_write` that leaves the caches alone and returns new ones."""
    q, k = rope(q, k, positions, cos_sin)
    return q, *functional_kv_write(k, v, k_cache, v_cache, slots, layout)


def functional_qk_norm_rope_kv_write(
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
    """`qk_norm_rope_kv_write` that leaves the caches alone and returns new ones."""
    q, k = qk_norm_rope(q, k, q_weight, k_weight, eps, positions, cos_sin)
    return q, *functional_kv_write(k, v, k_cache, v_cache, slots, layout)


def _bind_write(bind: Bind, spec: SiteSpec) -> Fn:
    return bind("kv_write", "kv_write", num_kv_heads=spec["num_kv_heads"], head_dim=spec["head_dim"],
                block_size=spec["block_size"], layout=spec["layout"], kv_dtype=spec["kv_dtype"])  # fmt: skip


def lower_rope_kv_write(bind: Bind, spec: SiteSpec) -> Fn:
    rotate, write = bind("rope", "rope", **_rotation(spec)), _bind_write(bind, spec)

    def composed(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k = rotate(q, k, positions, cos_sin)
        return q, *write(k, v, k_cache, v_cache, slots)

    return composed


def lower_qk_norm_rope_kv_write(bind: Bind, spec: SiteSpec) -> Fn:
    rotate, write = bind("qk_norm_rope", "rope", eps=spec["eps"], **_rotation(spec)), _bind_write(bind, spec)

    def composed(
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
        q, k = rotate(q, k, q_weight, k_weight, positions, cos_sin)
        return q, *write(k, v, k_cache, v_cache, slots)

    return composed


def _rotation(spec: SiteSpec) -> dict[str, Fact]:
    return {name: spec[name] for name in ("num_heads", "num_kv_heads", "head_dim", "rotary_dim")}


def _rotated_and_caches(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of either op, whose parameters end with the caches, the slots and the layout."""
    k_cache, v_cache = rest[-4:-2]
    return torch.empty_like(q), torch.empty_like(k_cache), torch.empty_like(v_cache)


_FACTS = ("num_heads", "num_kv_heads", "head_dim", "rotary_dim", "block_size", "layout", "kv_dtype")

OPS = (
    Op(
        "rope_kv_write",
        rope_kv_write,
        facts=_FACTS,
        lower=lower_rope_kv_write,
        functional=functional_rope_kv_write,
        outline=_rotated_and_caches,
    ),
    Op(
        "qk_norm_rope_kv_write",
        qk_norm_rope_kv_write,
        facts=(*_FACTS, "eps"),
        lower=lower_qk_norm_rope_kv_write,
        functional=functional_qk_norm_rope_kv_write,
        outline=_rotated_and_caches,
    ),
)
