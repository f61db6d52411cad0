"""Recorded steps of the CPU platform: replays compute anew, with the same results as running the step."""

from __future__ import annotations

import gc
import threading
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import PlatformError
from hotplug.core.request import Request, SamplingParams
from hotplug.platforms.cpu import CpuPlatform
from hotplug.platforms.cpu import capture as recording
from hotplug.platforms.cpu.capture import capture, opaque
from hotplug.platforms.cpu.native import library
from hotplug.platforms.cpu.native.linear import Packed, linear, linear_float32, pack

pytestmark = pytest.mark.skipif(
    library.refusal() is not None, reason=f"the native library does not serve: {library.refusal()}"
)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def weight(rows: int, cols: int) -> Packed:
    values = np.random.default_rng(rows).normal(size=(rows, cols)).astype(np.float32)
    return pack("Q8_0", gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0), rows, cols)


def test_a_replay_computes_from_what_is_in_memory_then() -> None:
    first, second = weight(64, 32), weight(32, 64)
    x, out = torch.randn(3, 32), torch.zeros(3, 32)

    def step() -> None:
        out.copy_(linear(torch.tanh(linear(x, first)), second) + 1)

    def expected() -> Tensor:
        return linear(torch.tanh(linear(x, first)), second) + 1

    replay = capture(step)
    assert torch.equal(out, expected())  # recording runs it
    for _ in range(3):
        x.normal_()
        replay()
        assert torch.equal(out, expected())


def test_what_may_be_a_view_is_computed_where_it_is_none() -> None:
    """In inference mode `contiguous`, `to` and `reshape` arrive whole, with a schema of views."""
    x, out = torch.randn(4, 6), torch.zeros(6, 4, dtype=torch.float64)

    def step() -> None:
        out.copy_(x.t().contiguous().to(torch.float64) + x.t().reshape(-1).view(6, 4) + x.view(-1)[:1])

    replay = capture(step)
    x.normal_()
    replay()
    assert torch.equal(out, x.t().double() + x.t() + x[0, 0])


def test_results_that_no_replay_leaves_in_place_are_written_there_each_time() -> None:
    x, total, ids = torch.randn(5), torch.zeros(5), torch.tensor([0, 3])

    def step() -> None:
        total.add_(x)
        total[ids] = x[ids] * 2
        total.clamp_(max=3.0)

    replay = capture(step)
    expected = total.clone()
    x.normal_()
    replay()
    expected += x
    expected[ids] = x[ids] * 2
    assert torch.equal(total, expected.clamp(max=3.0))


def test_a_step_reuses_memory_that_nothing_of_it_needs_any_more() -> None:
    layers = [weight(64, 64) for _ in range(20)]
    x, out = torch.randn(8, 64), torch.zeros(8, 64)
    places = set()

    def step() -> None:
        h = x
        for layer in layers:
            h = linear(h, layer)
            places.add(h.data_ptr())
        out.copy_(h)

    replay = capture(step)
    assert len(places) == 2  # what is read and what is written
    x.normal_()
    replay()
    h = x
    for layer in layers:
        h = linear(h, layer)
    assert torch.equal(out, h)


def test_memory_is_given_back_with_the_tensors_in_it() -> None:
    pool = recording._Pool()
    tensor = pool.tensor((100,), torch.float32)
    place, part = tensor.data_ptr(), tensor[:10]
    assert place % 64 == 0
    assert pool.holds(part)
    del tensor
    assert pool.tensor((100,), torch.float32).data_ptr() != place, "a view still lies in it"
    del part
    gc.collect()
    assert pool.tensor((70,), torch.float32).data_ptr() == place


def test_recorded_steps_of_several_sizes_do_not_disturb_each_other() -> None:
    layer = weight(32, 32)
    steps = {}
    for n in (1, 3, 4):
        x, out = torch.randn(n, 32), torch.zeros(n, 32)
        steps[n] = x, out, capture(lambda x=x, out=out: out.copy_(linear(linear(x, layer) * 2, layer)))
    for n in (4, 1, 3, 1, 4):
        x, out, replay = steps[n]
        x.normal_()
        replay()
        assert torch.equal(out, linear(linear(x, layer) * 2, layer))


def test_replays_in_several_threads_take_turns() -> None:
    """They compute in the same memory."""
    layer = weight(256, 256)

    def work(seed: int, bad: list[int]) -> None:
        with torch.inference_mode():
            generator = torch.Generator().manual_seed(seed)
            x, out = torch.zeros(4, 256), torch.zeros(4, 256)
            replay = capture(lambda: out.copy_(linear(torch.sin(linear(x, layer)), layer)))
            for _ in range(50):
                x.normal_(generator=generator)
                replay()
                if not torch.equal(out, linear(torch.sin(linear(x, layer)), layer)):
                    bad.append(seed)

    bad: list[int] = []
    threads = [threading.Thread(target=work, args=(seed, bad)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not bad


def test_a_value_read_on_the_host_cannot_be_recorded() -> None:
    x = torch.ones(3)
    with pytest.raises(PlatformError, match=r"reads values on the host cannot be recorded: aten.item"):
        capture(lambda: x.mul_(int(x.sum())))
    replay = capture(lambda: x.add_(1))  # nothing is left over of the attempt
    replay()
    assert x.tolist() == [3.0, 3.0, 3.0]


def test_an_opaque_kernel_is_called_again_as_a_whole() -> None:
    calls = []

    @opaque
    def repeated(x: Tensor, weight: Tensor) -> Tensor:
        count = int(x[0, 0])
        calls.append(count)
        return linear_float32(x, weight) * count

    x, out, w = torch.ones(2, 8), torch.zeros(2, 8), torch.eye(8)
    replay = capture(lambda: out.copy_(repeated(x, w) + 1))
    assert torch.equal(out, torch.full((2, 8), 2.0))
    x.fill_(3)
    replay()
    assert torch.equal(out, torch.full((2, 8), 10.0))
    assert calls == [1, 3]
    assert torch.equal(repeated(x, w), torch.full((2, 8), 9.0)), "outside of a recording it is the kernel"


def test_a_call_that_fails_in_a_replay_is_named() -> None:
    from hotplug.platforms.cpu.native.rope import rope_kv_write
    from hotplug.vendor import SiteSpec

    q, kv, cache = torch.zeros(1, 2, 16), torch.zeros(1, 2, 16), torch.zeros(2, 4, 2, 16)
    positions, slots, table = torch.tensor([0]), torch.tensor([0]), torch.zeros(8, 16)
    kernel = rope_kv_write(SiteSpec("rope_kv_write", "s", "float32", "avx2", {"layout": "NHD"}))
    replay = capture(lambda: kernel(q, kv, kv, positions, table, cache, cache, slots))
    replay()
    slots[0] = 99
    with pytest.raises(PlatformError, match="hp_rope_kv_write of the native library failed"):
        replay()


_UNARY = (torch.neg, torch.sin, lambda x: x[:, ::2].repeat(1, 2), lambda x: x.t().contiguous().t(), lambda x: x + 1,
          lambda x: linear(x.contiguous(), _SQUARE), lambda x: x.view(-1, 4, 8).transpose(1, 2).reshape(len(x), 32),
          lambda x: x.clone().mul_(2), lambda x: torch.cat((x[:, 16:], x[:, :16]), 1))  # fmt: skip
_SQUARE = weight(32, 32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(range(len(_UNARY))), st.integers(0, 7)), min_size=1, max_size=12),
       st.integers(1, 5))  # fmt: skip
def test_any_step_replays_as_it_runs(steps: list[tuple[int, int]], rows: int) -> None:
    """Values are used again at random later places, so that their memory must still be theirs."""
    with torch.inference_mode():
        x, out = torch.randn(rows, 32), torch.zeros(rows, 32)

        def step() -> None:
            values = [x]
            for which, used in steps:
                values.append(_UNARY[which](values[-1]) + values[used % len(values)] * 0.5)
                if len(values) > 4:
                    values.pop(1)
            out.copy_(values[-1])

        replay = capture(step)
        for _ in range(2):
            x.normal_()
            replay()
            found = out.clone()
            step()
            assert torch.equal(found, out)


def tokens(core: EngineCore) -> dict[str, list[int]]:
    """Greedy and sampled requests that end at different times, one of which needs the scores."""
    found: dict[str, list[int]] = {}
    for i in range(5):
        params = SamplingParams(temperature=float(i % 2), seed=i, max_tokens=6 + 5 * i, ignore_eos=True,
                                min_tokens=4 * (i == 4))  # fmt: skip
        core.add(Request(id=str(i), prompt_token_ids=list(range(5 + i, 30 - i)), sampling=params))
    while core.has_work:
        for delta in core.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    return found


def engine(folder: Any, mode: str, **options: Any) -> EngineCore:
    return EngineCore(EngineConfig(model=str(folder), device="cpu", exec=mode, load_format="dummy", max_num_seqs=8,
                                   max_model_len=128, kv_cache_memory="4MiB", **options))  # fmt: skip


@pytest.mark.parametrize(("model", "dtype"), [("tiny_model", "float32"), ("tiny_model", "bfloat16"),
                                              ("tiny_moe_model", "float32")])  # fmt: skip
def test_recorded_decodes_give_the_eager_tokens(model: str, dtype: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(model)
    core = engine(folder, "auto", dtype=dtype)
    assert core.report()["exec"] == "capture"
    assert not core._executor.worker.executable._decodes.made, "nothing is recorded at start"
    assert tokens(core) == tokens(engine(folder, "eager", dtype=dtype))
    sizes = core._executor.worker.executable._decodes.made
    assert set(sizes) == {1, 2, 3, 4, 5}, "each as many rows as there were"
    assert tokens(core) == tokens(engine(folder, "eager", dtype=dtype)), "replayed from the first step on"


def test_without_the_library_steps_run_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = CpuPlatform()
    (device,) = platform.probe()
    assert platform.limits(device).exec_modes[0] == "capture"
    monkeypatch.setattr(library, "refusal", lambda: "it is not there")
    assert "capture" not in platform.limits(device).exec_modes
    assert platform.limits(device).exec_modes[0] == "eager"
