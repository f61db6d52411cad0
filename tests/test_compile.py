"""Compiled steps: programs of opaque nodes, shapes that bound the scheduler, artifacts, and what serves meanwhile."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_platforms import FakePlatform, candidates, limits
from torch import Tensor

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import ConfigError, FeatureError, PlanError, PlatformError
from hotplug.core.ops.program import node
from hotplug.core.ops.registry import Impl, Op
from hotplug.core.platform.base import CompileLimits, DeviceInfo, ExecMode
from hotplug.core.platform.program import StepProgram
from hotplug.core.request import Request, SamplingParams
from hotplug.core.runner.artifacts import artifact_folder, source_hash
from hotplug.core.runner.compile import StepBounds, checked_shapes
from hotplug.core.runner.static import StepShape
from hotplug.core.startup import bind as bind_module
from hotplug.plugins.conformance.engine_runs import small_model

BUCKETS = [(1, 1), (8, 8), (16, 1), (24, 3)]
FEW = ((8, 8), (24, 3))
"""Enough where programs are looked at and not run."""
COMPILES: dict[str, Any] = {
    "exec_modes": (ExecMode.COMPILE, ExecMode.EAGER), "max_graph_shapes": 4, "mixed_steps": False,
    "index_dtype": "int32", "block_sizes": (32,), "shared_host_memory": True, "accelerator": False,
}  # fmt: skip


@dataclass
class Compiler(FakePlatform):
    """Runs programs as they are exported; keeps what it was given."""

    facts: Any = field(default_factory=lambda: limits(**COMPILES))
    shapes: Sequence[tuple[int, int]] = tuple(BUCKETS)
    programs: dict[tuple[int, int], StepProgram] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)
    ran: list[tuple[int, int]] = field(default_factory=list)
    sizes: list[tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=list)
    """Each step's shape, and how many tokens and requests it was given."""
    kept: list[tuple[tuple[int, int], int]] = field(default_factory=list)
    """Each step's shape, and how many hidden states it was asked for, if it is of varying size."""
    mark: str = "1"
    gate: threading.Event | None = None
    """Holds back what comes after the first shape."""
    compiled: int = 0

    def buckets(self, max_tokens: int, max_requests: int) -> Sequence[tuple[int, int]]:
        return self.shapes

    def compile(self, program: StepProgram, device: DeviceInfo, cache: Path) -> Callable[..., Any]:
        if self.gate is not None and self.programs:
            self.gate.wait()
        shape = (program.num_tokens, program.num_requests)
        self.programs[shape] = program
        self.folders.append(cache)
        module = program.inlined().module()
        self.compiled += 1

        def run(*inputs: Tensor) -> Sequence[Tensor]:
            self.ran.append(shape)
            self.sizes.append((shape, (len(inputs[0]), len(inputs[5]))))
            self.kept.append((shape, len(inputs[7])))
            return module(*inputs)

        return run

    def fingerprint(self) -> str:
        return self.mark

    def num_compiled(self) -> int:
        return self.compiled


class Idle(Compiler):
    """Is asked to compile, and leaves it at that."""

    def compile(self, program: StepProgram, device: DeviceInfo, cache: Path) -> Callable[..., Any]:
        self.folders.append(cache)
        return lambda *inputs: ()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HOTPLUG_CACHE", str(tmp_path))
    yield tmp_path


@pytest.fixture
def start(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineCore]:
    def make(platform: Any, *, wait: bool = True, **options: Any) -> EngineCore:
        monkeypatch.setattr(bind_module, "discover", lambda: candidates(platform))
        fixed = {
            "model": str(tiny_model),
            "max_num_seqs": 8,
            "max_model_len": 96,
            "kv_cache_memory": "4MiB",
            "load_format": "dummy",
        }
        core = EngineCore(EngineConfig(**{**fixed, **options}))
        if wait:
            core.wait_until_compiled()
        return core

    return make


def tokens(core: EngineCore, requests: int = 5) -> dict[str, list[int]]:
    """Greedy requests of different lengths, some longer than any shape, one of a single token."""
    found: dict[str, list[int]] = {}
    for i in range(requests):
        params = SamplingParams(temperature=0.0, max_tokens=4 + 3 * i, ignore_eos=True)
        prompt = list(range(3, 3 + (1, 7, 20, 33, 45)[i % 5]))
        core.add(Request(id=str(i), prompt_token_ids=prompt, sampling=params))
    while core.has_work:
        for delta in core.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    return found


@pytest.fixture
def expected(start: Callable[..., EngineCore]) -> dict[str, list[int]]:
    return tokens(start(FakePlatform(facts=limits(accelerator=False)), wait=False))


def calls(program: torch.export.ExportedProgram) -> list[str]:
    """Names of the operations that a program calls."""
    return [n.target.name() for n in program.graph.nodes
            if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload)]  # fmt: skip


# --- programs -------------------------------------------------------------------------------------


def test_a_program_has_one_node_a_call_site_of_the_model(start):
    platform = Compiler(shapes=FEW)
    core = start(platform)
    program = platform.programs[24, 3].export()
    nodes = [n for n in program.graph.nodes if str(n.target).startswith("hotplug.")]
    model = {c.spec.site for c in core.bound.kernels.plan.choices if not c.part_of}
    own = {c.spec.site for c in core.bound.kernels.plan.choices if c.spec.op in
           ("prepare_step", "argmax", "sample", "sample_rows", "logprobs", "penalties")}  # fmt: skip
    assert sorted(n.args[-1] for n in nodes) == sorted(model - own)


def test_an_inlined_program_is_functional_and_of_fixed_shape(start):
    platform = Compiler(shapes=FEW)
    start(platform)
    for program in (p.inlined() for p in platform.programs.values()):
        assert not [name for name in calls(program) if not name.startswith("aten::")]
        for n in program.graph.nodes:
            if isinstance(n.target, torch._ops.OpOverload):
                assert not n.target._schema.is_mutable, n
            if isinstance(value := n.meta.get("val"), Tensor):
                assert all(isinstance(size, int) for size in value.shape)
                assert value.dtype is not torch.int64, f"{n} has int64 where the index dtype is int32"


def test_sites_with_a_kernel_stay_nodes_and_come_with_it(start):
    def fused(x: Tensor, weight: Tensor) -> Any:
        return "fused"

    kernel = Impl("rms_norm", "acme", make=lambda _: fused)
    platform = Compiler(kernels=[kernel], shapes=FEW)
    start(platform)
    program = platform.programs[8, 8]
    called = [fn(torch.ones(2, 32), torch.ones(32), 1e-5) for fn in program.kernels.values()]  # as their nodes are
    assert called == ["fused"] * len(program.kernels)
    assert set(calls(program.export())) >= {"hotplug::rms_norm", "hotplug::linear"}
    left = [n.args[-1] for n in program.inlined().graph.nodes if str(n.target).startswith("hotplug.")]
    assert sorted(left) == sorted(program.kernels)
    assert "layers.1.attn_norm.norm" in left  # a part of a fused op that was lowered to it


def test_a_kernel_is_left_out_of_shapes_that_it_does_not_accept(start):
    kernel = Impl("attention", "acme", make=lambda _: lambda *a: None, accepts=lambda bucket: bucket.max_query_len == 1)
    platform = Compiler(kernels=[kernel], shapes=FEW)
    start(platform)
    assert len(platform.programs[8, 8].kernels) == 2
    assert not platform.programs[24, 3].kernels


def test_weights_are_named_as_the_program_names_them(start):
    platform = Compiler(shapes=FEW)
    start(platform)
    program = platform.programs[8, 8]
    signature = program.export().graph_signature
    named = {*signature.inputs_to_parameters.values(), *signature.inputs_to_buffers.values()}
    assert named == set(program.weights)


def test_an_op_whose_signature_no_program_can_hold_is_refused_by_name():
    def odd(x: Tensor, options: dict[str, int]) -> Tensor:
        return x

    with pytest.raises(PlanError, match=r"parameter options .* cannot stand in a compiled program"):
        node(Op("odd_for_programs", odd))


# --- steps ----------------------------------------------------------------------------------------


def test_compiled_steps_give_the_eager_tokens(start, expected):
    platform = Compiler()
    core = start(platform)
    assert tokens(core) == expected
    assert set(platform.ran) == set(BUCKETS)
    assert core.stats().recompiles == 0
    assert [entry["state"] for entry in core.report()["compiled"]] == ["ready"] * 4


def test_compiled_steps_of_a_mixture_of_experts_give_the_eager_tokens(start, tiny_moe_model):
    platform = Compiler(shapes=FEW)
    eager = start(FakePlatform(facts=limits(accelerator=False)), wait=False, model=str(tiny_moe_model))
    assert tokens(start(platform, model=str(tiny_moe_model))) == tokens(eager)
    assert {n for n in calls(platform.programs[8, 8].export()) if "moe" in n} == {
        "hotplug::moe_route", "hotplug::moe_experts"
    }  # fmt: skip


def test_mixed_steps_fit_a_shape_for_all_requests(start, expected):
    platform = Compiler(facts=limits(**{**COMPILES, "mixed_steps": True}), shapes=[(8, 8), (24, 8)])
    assert tokens(start(platform)) == expected
    assert set(platform.ran) == {(8, 8), (24, 8)}


def test_steps_of_varying_sizes_are_not_padded(start, expected):
    facts = {**COMPILES, "mixed_steps": True, "compiled": CompileLimits(dynamic=True)}
    platform = Compiler(facts=limits(**facts), shapes=[(24, 8)])
    core = start(platform)
    assert tokens(core) == expected
    assert tokens(core) == expected  # from the prefix cache, in short chunks
    assert {shape for shape, _ in platform.sizes} == {(24, 8)}
    assert {given for _, given in platform.sizes} >= {(1, 1), (24, 3), (5, 5)}


def test_only_scored_tokens_have_hidden_states_in_steps_of_varying_sizes(start):
    platform = Compiler(facts=limits(**{**COMPILES, "compiled": CompileLimits(dynamic=True)}), shapes=[(24, 8)])
    core, eager = start(platform), start(FakePlatform(facts=limits(accelerator=False)), wait=False)
    prompt = list(range(3, 40))

    def scores(core: EngineCore) -> list[float]:
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, prompt_logprobs=0)
        core.add(Request(id="a", prompt_token_ids=prompt, sampling=params))
        found = [delta for _ in range(9) if core.has_work for delta in core.step()]
        return [e.logprobs[0] for d in found for e in d.prompt_logprobs or () if e is not None]

    assert scores(core) == pytest.approx(scores(eager), abs=1e-4)
    platform.kept.clear()
    core.add(Request(id="b", prompt_token_ids=list(range(50, 90)), sampling=SamplingParams(max_tokens=1)))
    while core.has_work:
        core.step()
    assert [kept for _, kept in platform.kept] == [0, 1]  # 24 tokens without a score, 16 of which the last has one


def test_a_larger_shape_and_op_by_op_steps_serve_until_a_shape_is_ready(start, expected):
    platform = Compiler(gate=threading.Event())
    core = start(platform, wait=False, enable_prefix_cache=False)
    while core.report()["compiled"][-1]["state"] != "ready":  # the largest is compiled first
        threading.Event().wait(0.01)
    assert tokens(core) == expected
    assert set(platform.ran) == {(24, 3)}
    platform.gate.set()
    core.wait_until_compiled()
    assert tokens(core) == expected
    assert set(platform.ran) == set(BUCKETS)


def test_a_platform_that_only_compiles_starts_once_all_shapes_are_ready(start, expected):
    platform = Compiler(facts=limits(**{**COMPILES, "exec_modes": (ExecMode.COMPILE,)}))
    core = start(platform, wait=False)
    assert platform.compiled == 4
    assert tokens(core) == expected


def test_a_step_that_compiles_is_counted(start):
    platform = Compiler()
    core = start(platform)
    platform.compiled += 2
    assert core.stats().recompiles == 2


def test_a_failure_to_compile_stops_the_engine_with_its_traceback(start):
    class Broken(Compiler):
        def compile(self, program: StepProgram, device: DeviceInfo, cache: Path) -> Callable[..., Any]:
            raise ValueError("no such instruction")

    core = start(Broken(), wait=False)
    with pytest.raises(PlatformError, match=re.compile("compiling a step failed.*no such instruction", re.S)):
        core.wait_until_compiled()
    core.add(Request(id="a", prompt_token_ids=[1, 2], sampling=SamplingParams(max_tokens=1)))
    with pytest.raises(PlatformError, match="compiling a step failed"):
        core.step()


def test_eager_may_be_asked_for_on_a_platform_that_compiles(start, expected):
    platform = Compiler()
    assert tokens(start(platform, exec="eager")) == expected
    assert not platform.programs


def test_compile_on_a_platform_without_it_is_refused(start):
    with pytest.raises(FeatureError, match="exec compile is not among eager"):
        start(FakePlatform(), exec="compile")


def test_declaring_compile_without_the_methods_is_an_error(start):
    with pytest.raises(PlatformError, match="has not all of HasCompile"):
        start(FakePlatform(facts=limits(**COMPILES)))


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("buckets", "mixed", "fault"),
    [
        ([(4, 4), (16, 1)], False, "none holds the decodes of max_num_seqs 8"),
        ([(8, 8)], False, "none holds a prompt chunk"),
        ([(8, 8), (16, 4)], True, "none holds 8 requests and a prompt chunk"),
        ([(8, 8), (2, 4), (16, 1)], False, r"\(2, 4\) has fewer tokens than requests"),
        ([(8, 8), (16, 1), (32, 1), (64, 1)], False, "4 shapes are more than max_graph_shapes 3"),
    ],
)
def test_buckets_that_leave_a_step_unserved_are_refused(buckets, mixed, fault):
    with pytest.raises(PlatformError, match=fault):
        checked_shapes(buckets, max_num_seqs=8, max_shapes=3, mixed_steps=mixed, where="acme.buckets")


def test_the_shape_with_most_tokens_bounds_a_step():
    shapes, bounds = checked_shapes([(16, 2), (8, 8), (32, 1)], max_num_seqs=8, max_shapes=0, mixed_steps=False,
                                    where="")  # fmt: skip
    assert shapes == [StepShape(8, 8), StepShape(16, 2), StepShape(32, 1)]
    assert bounds == StepBounds(max_tokens=32, max_requests=1)


def test_without_chunked_prefill_prompts_must_fit_a_shape(start):
    with pytest.raises(ConfigError, match="chunked prefill is off"):
        start(Compiler(), enable_chunked_prefill=False)


# --- artifacts ------------------------------------------------------------------------------------


def test_a_second_start_gets_the_same_folders_and_another_program_others(start):
    first, second, third, other = Idle(), Idle(), Idle(mark="2"), Idle()
    for platform in (first, second, third):
        start(platform)
    start(other, kv_cache_memory="2MiB")
    assert first.folders == second.folders
    assert len(set(first.folders)) == 4
    assert not set(first.folders) & set(third.folders)
    assert not set(first.folders) & set(other.folders)


def test_a_folder_says_what_it_is_for(tmp_path):
    folder = artifact_folder(tmp_path, {"shape": [8, 8], "arch": "v1"})
    assert [p.name for p in folder.iterdir()] == ["facts.json"]
    assert '"arch": "v1"' in (folder / "facts.json").read_text()


def test_the_source_hash_follows_the_modules():
    assert source_hash(["hotplug.core.ops.norm"]) == source_hash(["hotplug.core.ops.norm"])
    assert source_hash(["hotplug.core.ops.norm"]) != source_hash(["hotplug.core.ops.rope"])


def test_the_number_of_kv_blocks_is_rounded_so_that_starts_agree(start, monkeypatch):
    counts = set()
    for total in (5_000_000, 5_100_000):
        counts.add(start(Idle(total=total), kv_cache_memory=None, max_model_len=64).num_blocks)
    assert len(counts) == 1


def test_swapped_blocks_go_from_and_to_the_caches_of_the_last_step(tmp_path):
    """A program may return other caches than it was given."""

    def run(platform: Any, **options: Any) -> tuple[EngineCore, dict[str, list[int]]]:
        config = EngineConfig(model=str(small_model(tmp_path)), max_num_seqs=8, max_model_len=96, **options)
        core, found = EngineCore(config, candidates=candidates(platform)), {}
        core.wait_until_compiled()
        for i in range(4):
            params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
            core.add(Request(id=str(i), prompt_token_ids=list(range(3 + i, 23 + i)), sampling=params))
        while core.has_work:
            for delta in core.step():
                found.setdefault(delta.request_id, []).extend(delta.token_ids)
        return core, found

    roomy, expected = run(FakePlatform(facts=limits(accelerator=False, block_sizes=(32,))), kv_cache_memory="4MiB")
    size = roomy.bound.kv.block_bytes
    swapping, found = run(Compiler(shapes=FEW), kv_cache_memory=7 * size, swap_space=9 * size)
    assert found == expected
    assert swapping.stats().blocks_swapped_in > 0
