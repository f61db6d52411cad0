"""Every attention kernel on steps long enough for it, with NaN and infinities where they must have no effect.

And models whose numbers overflow on some requests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from overflowing_model import write_overflowing_model
from test_values_stay_apart import BAD_PROMPTS, GREEDY, INNOCENT, RANDOM, tokens

from hotplug import LLM
from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.compare import compare
from hotplug.core.ops.reference import bound_reference
from hotplug.core.ops.registry import Bucket, Impl, SiteSpec
from hotplug.platforms.cuda import CudaPlatform
from hotplug.platforms.cuda.kernels import KERNELS
from hotplug.plugins.conformance.cases import Builder, Lens
from hotplug.plugins.conformance.check_ops import to

ATTENTION = [kernel for kernel in KERNELS if kernel.op == "attention"]
STEPS: dict[str, Lens] = {
    "decodes": [(1, 63), (1, 1), (1, 64), (1, 700), (1, 5000)] * 3,
    "a chunk": [(333, 333)],
    "chunks": [(1, 70), (1, 900), (300, 300), (290, 777), (512, 1500), (256, 257)],
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 128), (4, 4, 64)])
@pytest.mark.parametrize("kernel", ATTENTION, ids=lambda kernel: kernel.provider)
@torch.inference_mode()
def test_what_a_query_does_not_see_has_no_effect(
    kernel: Impl, heads: int, kv_heads: int, dim: int, dtype: str, window: int | None, step: str
) -> None:
    device, lens = torch.device("cuda"), STEPS[step]
    facts: dict[str, Any] = {
        "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "block_size": 64, "layout": "NHD",
        "kv_dtype": dtype, "scale": dim**-0.5, "window": window, "sinks": False, "soft_cap": None, "static": False,
    }  # fmt: skip
    arch = CudaPlatform().probe()[0].arch
    spec = SiteSpec("attention", "test", dtype, arch, facts)
    verdict = kernel.check(spec)
    if not verdict.ok:
        pytest.skip(verdict.reason)
    call = Builder(dtype, "int32", 1).call("attention", facts, lens, lost=True)
    assert call is not None
    longest = max(query for query, _ in lens)
    if kernel.accepts is not None and not kernel.accepts(Bucket(len(call.args[0]), longest)):
        pytest.skip("not for such steps")
    wide = [to(arg, device) for arg in call.args]
    wide[:3] = [x.float() for x in wide[:3]]
    expected = bound_reference(builtin_registry().op("attention"), facts)(*wide).to(call.args[0].dtype)
    assert expected.isnan().any() == (len(lens) > 1)
    assert expected.isfinite().any()
    got = kernel.make(spec)(*(to(arg, device) for arg in call.args))
    found = compare(got.cpu(), expected.cpu())
    assert found.ok, found.reason


@pytest.mark.parametrize("mode", ["capture", "eager"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_answers_are_the_same_before_and_after_requests_that_overflow(
    tiny_model: Path, tmp_path: Path, dtype: str, mode: str
) -> None:
    folder = write_overflowing_model(tiny_model, tmp_path / dtype, dtype)
    llm = LLM(str(folder), device="cuda", dtype=dtype, exec=mode, max_num_seqs=4, kv_cache_memory="400KiB",
              max_model_len=128)  # fmt: skip
    for params in (GREEDY, RANDOM, replace(GREEDY, logprobs=2), replace(GREEDY, speculative=True)):
        before = tokens(llm, INNOCENT, params)
        for _ in range(3):
            outputs = [output.outputs[0] for output in llm.generate([*BAD_PROMPTS, *INNOCENT], params, progress=False)]
            ends = [output.finish_reason for output in outputs]
            assert ends == ["error"] * len(BAD_PROMPTS) + ["length"] * len(INNOCENT)
            assert tokens(llm, INNOCENT, params) == before
