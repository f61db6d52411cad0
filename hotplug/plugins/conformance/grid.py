"""Which call sites and steps the op checks generate: usual ones one by one, and unusual ones by chance."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hotplug.core.ops.packed_linear import GROUP_BYTES
from hotplug.core.ops.packed_linear import OPS as _PACKED_OPS
from hotplug.core.ops.registry import Fact
from hotplug.core.platform.base import Limits
from hotplug.plugins.conformance.cases import Lens

HEADS = ((4, 4, 64), (8, 2, 64), (9, 3, 64), (6, 2, 32), (4, 1, 128))
"""(query heads, key/value heads, head dim)."""
EXPERTS = ((64, 32, 8, 2), (130, 33, 5, 5), (128, 96, 60, 4))
"""(hidden, width, experts, experts a token)."""
PACKED_OPS = frozenset(op.name for op in _PACKED_OPS)
WINDOWS = (None, 7, 1)


def call_sites(op: str, limits: Limits, *, quick: bool) -> Iterator[dict[str, Fact]]:
    """The facts of usual call sites of an op; nothing for an op that this kit does not know."""
    heads = HEADS[:3] if quick else HEADS
    experts = EXPERTS[:2] if quick else EXPERTS
    match op:
        case "embed":
            yield from ({"vocab": v, "hidden": h} for v, h in ((97, 64), (1000, 130)))
        case "linear":
            for i, o, b in ((64, 48, True), (130, 33, False), (128, 384, False)):
                yield {"in_features": i, "out_features": o, "bias": b, "scheme": "none"}
        case "logits":
            yield {"hidden": 64, "vocab": 257, "bias": False, "scheme": "none"}
        case "linear_packed":
            for scheme, (i, o, b) in itertools.product(GROUP_BYTES, ((64, 48, True), (96, 33, False))):
                yield {"in_features": i, "out_features": o, "bias": b, "scheme": scheme}
        case "linear_packed_silu_mul":
            for scheme, (i, w, b) in itertools.product(GROUP_BYTES, ((64, 48, True), (96, 33, False))):
                yield {"in_features": i, "width": w, "bias": b, "scheme": scheme}
        case "embed_packed" | "logits_packed":
            bias = {"bias": False} if op == "logits_packed" else {}
            yield from ({"vocab": 257, "hidden": 96, "scheme": scheme, **bias} for scheme in GROUP_BYTES)
        case "rms_norm" | "add_rms_norm" | "silu_mul" | "gelu_tanh_mul":
            eps: dict[str, Fact] = {} if op.endswith("_mul") else {"eps": 1e-5}
            yield from ({"width": width, **eps} for width in (64, 96, 130))
        case "linear_silu_mul":
            for i, w, b in ((64, 48, True), (130, 33, False)):
                yield {"in_features": i, "width": w, "bias": b, "scheme": "none"}
        case "rope_kv_write" | "qk_norm_rope_kv_write":
            for (h, kv, dim), part, cache in itertools.product(heads, (1, 2), _caches(limits, quick)):
                yield {"num_heads": h, "num_kv_heads": kv, "head_dim": dim, "rotary_dim": dim // part, **cache,
                       **_head_norm(op)}  # fmt: skip
        case "moe_route":
            for i, (h, _, e, k) in enumerate(experts):
                yield {"hidden": h, "num_experts": e, "top_k": k, "renormalize": i % 2 == 0}
        case "moe_experts":
            yield from ({"hidden": h, "width": w, "num_experts": e, "top_k": k} for h, w, e, k in experts)
        case "rope" | "qk_norm_rope":
            for h, kv, dim in heads:
                for rotary in (dim, dim // 2):
                    yield {"num_heads": h, "num_kv_heads": kv, "head_dim": dim, "rotary_dim": rotary,
                           **_head_norm(op)}  # fmt: skip
        case "kv_write":
            for (_, kv, dim), cache in itertools.product(heads, _caches(limits, quick)):
                yield {"num_kv_heads": kv, "head_dim": dim, **cache}
        case "block_copy":
            sizes = {kv * dim * size * width for _, kv, dim in heads for size in limits.block_sizes for width in (1, 4)}
            yield from ({"page_bytes": size} for size in sorted(sizes)[: 2 if quick else None])
        case "attention":
            yield from _attention_sites(heads, limits, quick)
        case "argmax" | "sample" | "sample_rows" | "logprobs" | "penalties":
            yield from ({"vocab": vocab} for vocab in (257, 1000))
        case "reject_sample":
            yield {}
        case "prepare_inputs" | "prepare_step":
            yield from ({"block_size": size} for size in limits.block_sizes[:2])


def _head_norm(op: str) -> dict[str, Fact]:
    """The facts that an op has which normalizes heads too."""
    return {"eps": 1e-6} if op.startswith("qk_norm") else {}


def _attention_sites(heads: Sequence[tuple[int, int, int]], limits: Limits, quick: bool) -> Iterator[dict[str, Fact]]:
    """Windows and static steps over all heads and caches, then sinks and soft caps over one of them."""
    windows = WINDOWS[:2] if quick else WINDOWS
    for (h, kv, dim), window, static, cache in itertools.product(heads, windows, (False, True), _caches(limits, quick)):
        yield {"num_heads": h, "num_kv_heads": kv, "head_dim": dim, "scale": dim**-0.5, "window": window,
               "sinks": False, "soft_cap": None, "static": static, **cache}  # fmt: skip
    (h, kv, dim), cache = heads[1], _caches(limits, quick)[0]
    more = ((True, 0.5, False), (True, None, True), (False, 0.5, True))
    for sinks, soft_cap, static in more[:1] if quick else more:
        yield {"num_heads": h, "num_kv_heads": kv, "head_dim": dim, "scale": dim**-0.5, "window": None,
               "sinks": sinks, "soft_cap": soft_cap, "static": static, **cache}  # fmt: skip


def _caches(limits: Limits, quick: bool) -> Sequence[dict[str, Fact]]:
    sizes = limits.block_sizes[: 1 if quick else 2]
    dtypes = limits.kv_dtypes or limits.dtypes
    return [
        {"block_size": size, "layout": str(layout), "kv_dtype": dtype}
        for size, layout, dtype in itertools.product(sizes, limits.kv_layouts, dtypes[:1] if quick else dtypes)
    ]


def steps(op: str, facts: Mapping[str, Fact], *, quick: bool) -> Sequence[tuple[str, Lens]]:
    """Steps to try at a call site, each with a name."""
    if op == "attention":
        block = int(facts["block_size"] or 16)
        found: list[tuple[str, Lens]] = [
            ("no token", []),
            ("one token", [(1, 1)]),
            ("decodes at and around the end of a block", [(1, block), (1, block + 1), (1, 2 * block - 1)]),
            ("a prompt", [(2 * block + 3, 2 * block + 3)]),
            ("a chunk of a prompt", [(7, block + 12)]),
            ("decodes and chunks together", [(1, 40), (1, 3), (3, 20), (block, block)]),
        ]
        if facts["static"]:  # decodes and chunks of static steps come in shapes of their own
            found = [step for step in found if step[0] != "no token"]
        return found if quick else [*found, ("a long context", [(1, 700), (64, 500)])]
    found = [
        ("no token", []),
        ("one token", [(1, 1)]),
        ("an odd number of tokens", [(1, 9), (1, 2), (34, 34)]),
    ]
    if op in ("argmax", "sample", "sample_rows", "reject_sample", "logprobs", "penalties"):
        return found[1:]
    return found if quick else [*found, ("many tokens", [(513, 513)])]


class Fuzz:
    """Call sites by chance, among what the plan could ask on a device."""

    def __init__(self, limits: Limits, seed: int) -> None:
        self._limits = limits
        self._random = random.Random(seed)

    def facts(self, op: str, names: Sequence[str]) -> dict[str, Fact]:
        """Facts of `op`, which declares `names`."""
        pick = self._random.choice
        experts = pick((1, 3, 8, 40))
        kv_heads, dim = pick((1, 2, 3, 5, 8)), pick((8, 16, 30, 40, 64, 80, 96, 112, 128, 192, 256))
        pool: dict[str, Any] = {
            "num_heads": kv_heads * pick((1, 2, 3, 4, 7)),
            "num_kv_heads": kv_heads,
            "head_dim": dim,
            "rotary_dim": pick((dim, dim // 4 * 2)),
            "block_size": pick(self._limits.block_sizes),
            "layout": str(pick(self._limits.kv_layouts)),
            "kv_dtype": pick(self._limits.kv_dtypes or self._limits.dtypes),
            "scale": pick((dim**-0.5, 0.125)),
            "window": pick((None, None, 1, 5, 64)),
            "sinks": pick((False, False, True)),
            "soft_cap": pick((None, None, 0.5, 20.0)),
            "static": pick((False, True)),
            "vocab": pick((2, 31, 257, 1000)),
            "hidden": pick((8, 33, 64, 130)),
            "width": pick((2, 7, 64, 96, 1000)),
            "eps": pick((1e-5, 1e-6)),
            "num_experts": experts,
            "top_k": pick([k for k in (1, 2, 4, 6, 8) if k <= experts]),
            "renormalize": pick((False, True)),
            "in_features": pick((8, 33, 64, 130)),
            "out_features": pick((1, 7, 48, 256)),
            "bias": pick((False, True)),
            "scheme": "none",
            "page_bytes": pick((16, 48, 100, 4096, 65536)),
        }
        if op in PACKED_OPS:  # rows of whole groups, and enough results for what rounding to eight bits may change
            pool |= {"hidden": pick((32, 64, 160)), "in_features": pick((32, 64, 160, 576)), "vocab": pick((257, 1000)),
                     "out_features": pick((33, 48, 256)), "width": pick((33, 48, 256)),
                     "scheme": pick(tuple(GROUP_BYTES))}  # fmt: skip
        return {name: pool[name] for name in names}

    def dtype(self) -> str:
        return self._random.choice(self._limits.dtypes)

    def lens(self, *, static: bool) -> Lens:
        """A step: decodes first; a static one of decodes or of chunks."""
        pick = self._random.randint
        decodes = [(1, pick(1, 40)) for _ in range(pick(0, 3))]
        chunks = [(n, n + pick(0, 30)) for n in (pick(1, 20) for _ in range(pick(0, 2)))]
        if static and self._random.random() < 0.5:
            return decodes or [(1, 1)]
        return (decodes + chunks) or [(1, 1)]
