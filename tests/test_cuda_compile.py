"""Steps compiled by Inductor, on the host's tensors: kernels stay opaque calls, caches are written where they are,
artifacts are found again, and a step is recorded as a graph from its second call on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_platforms import FakePlatform, candidates, limits
from torch import Tensor
from whole_calls import reference_kernel

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.program import node
from hotplug.core.ops.registry import Impl
from hotplug.core.platform.base import DeviceInfo, ExecMode
from hotplug.core.platform.program import StepProgram
from hotplug.core.request import Request, SamplingParams
from hotplug.core.runner.compile import checked_shapes
from hotplug.core.startup import bind as bind_module
from hotplug.platforms.cuda import compile as inductor
from hotplug.platforms.cuda import opaque
from hotplug.vendor import PlatformError

KERNELS = (
    reference_kernel("rms_norm", "acme"),
    reference_kernel("kv_write", "acme"),
    reference_kernel("attention", "acme"),
)
FUSED = (reference_kernel("rope_kv_write", "acme"), reference_kernel("attention", "acme"))
"""With a kernel that writes to the caches and returns a new tensor too."""
FACTS: dict[str, Any] = {"exec_modes": (ExecMode.COMPILE,), "index_dtype": "int32", "accelerator": False,
                         "shared_host_memory": True}  # fmt: skip


@dataclass
class Inductor(FakePlatform):
    """Compiles as the platform of the GPUs does; a recorded step is the step itself."""

    facts: Any = field(default_factory=lambda: limits(**FACTS))
    kernels: Sequence[Impl] = KERNELS
    recorded: int = 0
    steps: list[Callable[..., Any]] = field(default_factory=list)
    programs: list[StepProgram] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.compiler = inductor.Compiler(self.capture)

    def capture(self, step: Callable[[], Any], device: DeviceInfo) -> Callable[[], Any]:
        self.recorded += 1
        return step

    def buckets(self, max_tokens: int, max_requests: int) -> Sequence[tuple[int, int]]:
        return [(max_requests, max_requests), (24, max_requests)]

    def compile(self, program: StepProgram, device: DeviceInfo, cache: Path) -> Callable[..., Any]:
        self.programs.append(program)
        self.steps.append(self.compiler.compile(program, device, cache))
        return self.steps[-1]

    def fingerprint(self) -> str:
        return inductor.fingerprint(["Acme 1"])

    def num_compiled(self) -> int:
        return self.compiler.num_compiled


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HOTPLUG_CACHE", str(tmp_path))
    yield tmp_path


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, torch.fx.GraphModule]:
    """Graphs run node by node in place of what Inductor makes of them; an artifact file holds a graph's number."""
    graphs: dict[bytes, torch.fx.GraphModule] = {}

    class Artifact:
        def __init__(self, graph: torch.fx.GraphModule) -> None:
            self.number = str(len(graphs)).encode()
            graphs[self.number] = graph

        def save(self, *, path: str, format: str) -> None:  # noqa: A002
            Path(path).write_bytes(self.number)

    monkeypatch.setattr(inductor, "_compiled", Artifact)
    monkeypatch.setattr(inductor, "_loaded", lambda path: graphs[path.read_bytes()])
    return graphs


@pytest.fixture
def start(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineCore]:
    def make(platform: Any, **options: Any) -> EngineCore:
        monkeypatch.setattr(bind_module, "discover", lambda: candidates(platform))
        fixed = {"max_num_seqs": 4, "max_model_len": 96, "kv_cache_memory": "4MiB", "load_format": "dummy"}
        core = EngineCore(EngineConfig(model=str(tiny_model), **{**fixed, **options}))
        if isinstance(platform, Inductor):
            core.wait_until_compiled()
        return core

    return make


def answers(core: EngineCore) -> dict[str, list[tuple[int, float]]]:
    """Greedy tokens and their log-probabilities of requests of different lengths."""
    found: dict[str, list[tuple[int, float]]] = {}
    for i in range(4):
        params = SamplingParams(temperature=0.0, max_tokens=3 + i, ignore_eos=True, logprobs=1)
        core.add(Request(id=str(i), prompt_token_ids=list(range(3, 3 + (1, 7, 20, 40)[i])), sampling=params))
    while core.has_work:
        for delta in core.step():
            values = [entry.logprobs[0] for entry in delta.logprobs]
            found.setdefault(delta.request_id, []).extend(zip(delta.token_ids, values, strict=True))
    return found


def same(a: dict[str, list[tuple[int, float]]], b: dict[str, list[tuple[int, float]]]) -> bool:
    return {k: [t for t, _ in v] for k, v in a.items()} == {k: [t for t, _ in v] for k, v in b.items()} and all(
        abs(p - q) < 1e-4 for k in a for (_, p), (_, q) in zip(a[k], b[k], strict=True)
    )


def calls(graph: torch.fx.GraphModule) -> list[str]:
    return [n.target.name() for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]


# --- operators ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "schema"),
    [
        ("rms_norm", "rms_norm(Tensor x, Tensor weight, float eps, str kernel) -> Tensor"),
        ("kv_write", "kv_write(Tensor k, Tensor v, Tensor(a0!) k_cache, Tensor(a1!) v_cache, Tensor slots, "
                     "str layout, str kernel) -> ()"),
        ("rope_kv_write", "rope_kv_write(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor cos_sin, "
                          "Tensor(a0!) k_cache, Tensor(a1!) v_cache, Tensor slots, str layout, str kernel) -> Tensor"),
    ],
)  # fmt: skip
def test_an_operator_has_the_parameters_of_its_node_and_says_what_it_writes(op, schema):
    assert opaque.schema_of(node(builtin_registry().op(op))) == schema


def test_every_op_that_writes_to_its_arguments_is_known():
    registry = builtin_registry()
    assert set(opaque.WRITTEN) == {name for name in registry.names if registry.op(name).functional is not None}


def test_another_operator_of_a_name_is_refused():
    opaque.operator("odd_op(Tensor x, str kernel) -> Tensor")
    with pytest.raises(PlatformError, match="another operator of this name"):
        opaque.operator("odd_op(Tensor x, int n, str kernel) -> Tensor")


def test_what_a_kernel_returns_is_dense_and_its_own():
    x = torch.arange(6.0).reshape(2, 3)
    operator = opaque.operator("odd_view(Tensor x, str kernel) -> Tensor")
    opaque.provide("transposed", lambda x: x.t().clone(memory_format=torch.preserve_format))
    opaque.provide("given", lambda x: x)
    assert operator(x, "transposed").is_contiguous()
    assert operator(x, "given").data_ptr() != x.data_ptr()
    assert torch.equal(operator(x, "given"), x)


# --- graphs ---------------------------------------------------------------------------------------


def test_kernels_stay_calls_and_all_else_is_aten(start, interpreted):
    platform = Inductor()
    start(platform)
    names = [name for graph in interpreted.values() for name in calls(graph)]
    assert {n for n in names if not n.startswith("aten::")} == {
        "hotplug_kernels::rms_norm", "hotplug_kernels::kv_write", "hotplug_kernels::attention"}  # fmt: skip
    per_step = len(platform.programs[0].kernels)
    assert sum(n.startswith("hotplug_kernels::") for n in names) == 2 * per_step


@pytest.mark.parametrize("kernels", [KERNELS, FUSED], ids=["kernels", "fused"])
def test_with_kernels_for_the_cache_nothing_is_copied_into_it(start, interpreted, kernels):
    start(Inductor(kernels=kernels))
    for graph in interpreted.values():
        assert "aten::copy_" not in calls(graph)
        assert "aten::index_put" not in calls(graph)


def test_inputs_are_described_as_tensors_of_their_own(start, interpreted):
    """The caches are views of one allocation, which Inductor is not to know."""
    core = start(Inductor(kernels=FUSED))
    caches = [cache for blocks in core._executor.worker.executable._kv for cache in blocks]
    assert len({cache.untyped_storage().data_ptr() for cache in caches}) == 1
    assert any(cache.storage_offset() for cache in caches)
    for graph in interpreted.values():
        values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        assert {value.storage_offset() for value in values} == {0}
        assert len({value.untyped_storage()._cdata for value in values}) == len(values)
        assert [(v.shape, v.stride()) for v in values[-4:]] == [(c.shape, c.stride()) for c in caches]


def test_without_a_kernel_each_cache_is_copied_into_the_given_one_at_the_end(start, interpreted):
    start(Inductor(kernels=()))
    for graph in interpreted.values():
        assert calls(graph)[-4:] == ["aten::copy_"] * 4  # two layers, keys and values
        assert len(next(n for n in graph.graph.nodes if n.op == "output").args[0]) == 2


def test_tied_weights_are_one_input(start, interpreted):
    platform = Inductor()
    start(platform)
    names = json.loads(_files("step.json")[0].read_text())["weights"]
    weights = platform.programs[0].weights
    assert len({weights[name].data_ptr() for name in names}) == len(names)
    assert {weights[name].data_ptr() for name in names} == {t.data_ptr() for t in weights.values()}


def _files(name: str) -> list[Path]:
    from hotplug.core.weights.source import cache_folder

    return sorted(cache_folder().glob(f"compiled/**/{name}"))


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [KERNELS, FUSED, ()], ids=["kernels", "fused", "references"])
def test_steps_give_the_eager_answers(start, interpreted, kernels):
    platform = Inductor(kernels=kernels)
    assert same(answers(start(platform)), answers(start(FakePlatform(facts=limits(accelerator=False)))))
    assert platform.recorded == 2  # each shape once
    assert platform.num_compiled() == 2


def test_the_caches_returned_are_those_given_and_hold_the_step(start, interpreted):
    platform = Inductor()
    core = start(platform)
    answers(core)
    step = platform.steps[0]
    caches = step._inputs[step._num_inputs :]
    assert len(caches) == 4
    before = [cache.data_ptr() for cache in caches]
    with torch.inference_mode():
        returned = step(*step._inputs)[2:]
    assert all(a is b for a, b in zip(returned, caches, strict=True))
    assert [cache.data_ptr() for cache in returned] == before
    assert all(cache.any() for cache in caches)


def test_a_second_start_compiles_nothing_and_exports_nothing(start, interpreted, monkeypatch):
    expected = answers(start(Inductor()))
    second = Inductor()
    monkeypatch.setattr(inductor, "lower", None)
    assert same(answers(start(second)), expected)
    assert second.num_compiled() == 0


def test_an_artifact_without_its_description_is_made_again(start, interpreted):
    start(Inductor())
    for file in _files("step.json"):
        file.unlink()
    second = Inductor()
    start(second)
    assert second.num_compiled() == 2


# --- recording ------------------------------------------------------------------------------------


def step_of(record: Callable[[Callable[[], Any]], Any], ran: list[str]) -> inductor._Step:
    def code(*tensors: Tensor) -> list[Tensor]:
        ran.append("run")
        return [tensors[0], tensors[1]]

    return inductor._Step(code, [], 7, record)


def test_a_step_warms_up_is_recorded_and_replayed():
    ran: list[str] = []

    def record(run: Callable[[], Any]) -> Callable[[], Any]:
        run()
        ran.append("recorded")
        return lambda: ran.append("replay")

    step, inputs = step_of(record, ran), [torch.zeros(1) for _ in range(9)]
    for _ in range(3):
        outputs = step(*inputs)
    assert ran == ["run", "run", "recorded", "replay", "replay"]
    assert [a is b for a, b in zip(outputs, [*inputs[:2], *inputs[7:]], strict=True)] == [True] * 4


def test_other_tensors_are_not_served_by_a_recording_of_the_first():
    ran: list[str] = []
    step = step_of(lambda run: lambda: ran.append("replay"), ran)
    first, second = ([torch.full((1,), float(i)) for _ in range(9)] for i in range(2))
    for inputs in (first, first, second):
        outputs = step(*inputs)
    assert ran == ["run", "replay", "run"]
    assert outputs[0] is second[0]


def test_nothing_is_recorded_while_a_shape_compiles(start, interpreted):
    platform = Inductor()
    core = start(platform)
    with platform.compiler._busy:
        answers(core)
        assert platform.recorded == 0
    answers(core)
    assert platform.recorded == 2


def test_long_steps_are_not_recorded(start, interpreted, monkeypatch):
    monkeypatch.setattr(inductor, "CAPTURED_TOKENS", 4)
    platform = Inductor()
    answers(start(platform))
    assert platform.recorded == 1


# --- shapes and versions --------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "requests"), [(8192, 256), (8192, 1), (64, 64), (300, 300), (2048, 7), (1, 1)])
def test_buckets_serve_every_step(tokens, requests):
    shapes, bounds = checked_shapes(inductor.buckets(tokens, requests), max_num_seqs=requests, max_shapes=0,
                                    mixed_steps=True, where="")  # fmt: skip
    assert bounds.max_requests == requests
    assert bounds.max_tokens == max(tokens, requests + 1)
    assert len(shapes) <= 10


def test_the_fingerprint_names_what_an_artifact_depends_on(monkeypatch):
    text = inductor.fingerprint(["Acme 1"])
    assert f"torch {torch.__version__}" in text
    assert "triton" in text and "cuda" in text and "Acme 1" in text
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert inductor.fingerprint(["Acme 1"]) != text
    assert inductor.fingerprint(["Acme 2"]) != inductor.fingerprint(["Acme 1"])


# --- Inductor itself ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler for the host")
@pytest.mark.parametrize("kernels", [KERNELS, FUSED, ()], ids=["kernels", "fused", "references"])
def test_inductor_gives_the_eager_answers_copies_no_cache_and_is_found_again(start, kernels):
    from torch._inductor.utils import fresh_cache
    from torch.profiler import ProfilerActivity, profile

    expected = answers(start(FakePlatform(facts=limits(accelerator=False))))
    with fresh_cache():
        first = Inductor(kernels=kernels)
        core = start(first)
        assert same(answers(core), expected)
        assert (first.num_compiled(), first.recorded) == (2, 2)
        step = first.steps[-1]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace, torch.inference_mode():
            step(*step._inputs)
        cache = step._inputs[-1]
        assert max(event.cpu_memory_usage for event in trace.events()) < cache.numel() * cache.element_size() // 4
    with fresh_cache():  # what Inductor keeps itself is gone, so all comes from our file
        second = Inductor(kernels=kernels)
        assert same(answers(start(second)), expected)
        assert second.num_compiled() == 0
