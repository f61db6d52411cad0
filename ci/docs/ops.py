"""Writes docs/ops.md from the built-in ops: signature, reference's docstring, facts, parts. `make docs`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from hotplug.core.ops.attention import AttentionInputs
from hotplug.core.ops.builtin import builtin_ops
from hotplug.core.ops.reference import call_parameters, static_parameters
from hotplug.core.ops.registry import Op

PAGE = Path(__file__).parent.parent.parent / "docs" / "ops.md"
HEAD = """# Operations

Every operation that a kernel may claim, with the signature of its plain-PyTorch reference, and the static facts that
its call sites state (`spec["head_dim"]` in `check` and `make`). A parameter that bears the name of a fact and is no
tensor is static: a kernel has it from the facts, and what `make` gives is called with the other parameters alone, as
the line below the signature shows. Written by `make docs` from `hotplug/core/ops/`; a test keeps it so. What a kernel
may rely on is in [platforms.md](platforms.md#kernels).

A KV cache is [num_blocks, block_size, kv_heads, head_dim] in layout `NHD` and
[num_blocks, kv_heads, block_size, head_dim] in `HND`; block 0 belongs to nobody. Positions, slots, block tables and
lengths have `Limits.index_dtype`.

"""
FACTS = {
    "vocab": "vocabulary size",
    "hidden": "width of the hidden state",
    "eps": "what is added to the mean square under the root",
    "scale": "what scores are multiplied by",
    "renormalize": "whether the weights of a token's experts are divided by their sum",
    "width": "size of the last dimension (of the result, for a gate), or of an expert's inner layer",
    "in_features": "columns of the weight",
    "out_features": "rows of the weight",
    "bias": "whether there is a bias",
    "scheme": "weight scheme, `none` for floating point",
    "num_experts": "experts of a layer",
    "top_k": "experts a token goes to",
    "num_heads": "query heads",
    "num_kv_heads": "key/value heads",
    "head_dim": "elements of a head",
    "rotary_dim": "leading elements of a head that are rotated",
    "window": "tokens that a query sees, itself included; None = all before it",
    "sinks": "whether heads have a logit that takes part in the softmax's sum only",
    "soft_cap": "bound that a tanh puts on scores; None = none",
    "static": "whether steps may have a static shape: then lengths are on the device only",
    "block_size": "tokens in a KV block",
    "layout": "`NHD` or `HND`",
    "kv_dtype": "storage dtype of the KV cache",
    "page_bytes": "bytes of a block in each tensor",
    "group": "the named group of ranks that take part: `tp`, those that split every layer",
    "ranks": "how many they are",
}


def page() -> str:
    """The text of docs/ops.md."""
    sections = [_section(op) for op in sorted(builtin_ops(), key=lambda op: op.name)]
    return HEAD + "\n".join(sections) + "\n" + _inputs()


def _section(op: Op) -> str:
    signature = str(inspect.signature(op.reference, eval_str=True))
    signature = re.sub(r"\b(?:\w+\.)+(Tensor|AttentionInputs)\b", r"\1", signature)
    lines = [f"## {op.name}", "", "```python", f"{op.name}{signature}", "```", ""]
    if static_parameters(op):
        lines += [f"Called as `{op.name}({', '.join(call_parameters(op))})`.", ""]
    lines += [inspect.getdoc(op.reference) or ""]
    if op.lower is not None:
        lines += ["", "A fused op: where no kernel claims it, its parts are bound in turn."]
    if op.facts:
        lines += ["", "| fact | meaning |", "|---|---|", *(f"| `{fact}` | {FACTS[fact]} |" for fact in op.facts)]
    return "\n".join(lines) + "\n"


def _inputs() -> str:
    """What `step` holds."""
    source = inspect.getsource(AttentionInputs)
    body = source[: source.index("    _made")].rstrip()
    once = inspect.getdoc(AttentionInputs.once)
    return f"## AttentionInputs\n\n```python\n{body}\n```\n\n`once(make, *args)`: {once}\n"


if __name__ == "__main__":
    PAGE.write_text(page())
