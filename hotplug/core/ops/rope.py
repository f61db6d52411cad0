"""Rotary position embedding (Su et al., RoFormer), alone and after the per-head norm of Qwen3.

The two halves of a head are rotated against each other (the layout of Hugging Face checkpoints).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hotplug.core.ops.norm import rms_norm
from hotplug.core.ops.registry import Bind, Fn, Op, SiteSpec


def rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate `q` [num_tokens, heads, head_dim] and `k` [num_tokens, kv_heads, head_dim].

    `cos_sin` float32 [max_position, rotary_dim]: cosines of the rotary_dim/2 frequencies, then their sines.
    Dimensions past rotary_dim pass through. Returns new tensors in the input's dtype.
    """
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    wide = x.to(torch.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
    return rotated.to(x.dtype)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, positions: Tensor, cos_sin: Tensor
) -> tuple[Tensor, Tensor]:
    """RMS norm of every head of `q` and `k` (weights [head_dim]), then `rope`."""
    return rope(rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), positions, cos_sin)


def lower_qk_norm_rope(bind: Bind, spec: SiteSpec) -> Fn:
    head_dim, rotary_dim = spec["head_dim"], spec["rotary_dim"]
    q_norm = bind("rms_norm", "q_norm", width=head_dim, eps=spec["eps"])
    k_norm = bind("rms_norm", "k_norm", width=head_dim, eps=spec["eps"])
    rotate = bind("rope", "rope", num_heads=spec["num_heads"], num_kv_heads=spec["num_kv_heads"],
                  head_dim=head_dim, rotary_dim=rotary_dim)  # fmt: skip

    def composed(
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return rotate(q_norm(q, q_weight), k_norm(k, k_weight), positions, cos_sin)

    return composed


_FACTS = ("num_heads", "num_kv_heads", "head_dim", "rotary_dim")

OPS = (
    Op("rope", rope, facts=_FACTS),
    Op("qk_norm_rope", qk_norm_rope, facts=(*_FACTS, "eps"), lower=lower_qk_norm_rope),
)
