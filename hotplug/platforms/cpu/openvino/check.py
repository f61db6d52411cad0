"""What a compiled step can hold, by the static facts of a call site; needs no OpenVINO."""

from __future__ import annotations

from hotplug.vendor import SiteSpec, Verdict

OPS = frozenset({
    "embed", "embed_packed", "linear", "linear_packed", "logits", "logits_packed", "rms_norm", "add_rms_norm",
    "silu_mul", "gelu_tanh_mul", "linear_silu_mul", "linear_packed_silu_mul", "rope", "qk_norm_rope", "kv_write",
    "rope_kv_write", "qk_norm_rope_kv_write", "attention",
})  # fmt: skip
"""Ops of hotplug that `operations` translates."""


def check(spec: SiteSpec) -> Verdict:
    """Whether the op of a call site has a translation for its facts."""
    if spec.op not in OPS:
        return Verdict(False, f"no translation of {spec.op} to OpenVINO")
    if spec.op == "attention" and spec["soft_cap"] is not None:
        return Verdict(False, "OpenVINO's paged attention has no soft cap")
    return Verdict(True, "OpenVINO")
