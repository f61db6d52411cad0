"""Whole steps compiled by Inductor: our kernels as opaque calls, everything else fused, replayed as CUDA graphs.

The KV caches are written in place: the program's functional `kv_write` becomes an operator that mutates its arguments,
and the caches returned are those given. Artifacts hold code and no weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import getitem, is_
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from hotplug.platforms.cuda import opaque
from hotplug.vendor import DeviceInfo, PlatformError

if TYPE_CHECKING:
    from hotplug.vendor import StepProgram

FORMAT = 1
"""Raised when what is written here changes its form."""

CAPTURED_TOKENS = 1024
"""Steps of more tokens keep the device busy longer than launching takes, so they are not recorded."""

OPTIONS = {"triton.cudagraphs": False}
"""Of Inductor: graphs are recorded here, over the whole step and from one pool."""

Capture = Callable[[Callable[[], Any], DeviceInfo], Callable[[], Any]]


def buckets(max_tokens: int, max_requests: int) -> list[tuple[int, int]]:
    """Decodes of 1, 4, 16, ... requests and prompt chunks of 256, 1024, ... tokens, up to the largest of each.

    Factors of 4, since each shape costs a compilation: a step of weights read once takes padding rows for little.
    """
    decodes = [n for n in (4**i for i in range(10)) if n < max_requests]
    largest = max(max_tokens, max_requests + 1)
    prompts = [n for n in (4**i for i in range(4, 12)) if max_requests < n < largest]
    return [(n, n) for n in (*decodes, max_requests)] + [(n, max_requests) for n in (*prompts, largest)]


def fingerprint(devices: Sequence[str]) -> str:
    """What an artifact depends on beyond its program: versions of the compilers, the devices, and our operators."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    source = b"".join(Path(file).read_bytes() for file in (__file__, opaque.__file__))
    parts = [f"format {FORMAT}", hashlib.sha256(source).hexdigest()[:12], f"torch {torch.__version__}",
             f"{torch.version.git_version}", f"triton {triton}", f"cuda {torch.version.cuda}",
             *sorted(set(devices))]  # fmt: skip
    return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class _Interface:
    """What must be in place before an artifact runs; kept beside it as step.json."""

    weights: list[str]
    """Names of the weights that it takes before the step's inputs."""
    operators: list[str]
    """Schemas of the operators that it calls."""
    sites: list[str]
    """Call sites whose kernels they are given."""


class Compiler:
    """Compiles steps, or loads them. `capture` records a function as a graph and answers its replay."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._busy = threading.Lock()
        self.num_compiled = 0

    def compile(self, program: StepProgram, device: DeviceInfo, cache: Path) -> Callable[..., list[Tensor]]:
        """See `HasCompile.compile`."""
        with self._busy, torch.no_grad():
            artifact, described = cache / "step.inductor", cache / "step.json"
            if not described.exists():  # written last
                interface, graph = lower(program, cache.name)
                _save(_compiled(graph), artifact)
                _write(described, json.dumps(asdict(interface)))
                self.num_compiled += 1
            interface = _Interface(**json.loads(described.read_text()))
            for schema in interface.operators:
                opaque.operator(schema)
            for site in interface.sites:
                opaque.provide(_kernel_name(cache.name, site), program.kernels[site])
            code = _loaded(artifact)
        weights = [program.weights[name] for name in interface.weights]
        recorded = program.num_tokens <= CAPTURED_TOKENS
        return _Step(
            code, weights, len(program.inputs), lambda step: self._recorded(step, device) if recorded else None
        )

    def _recorded(self, step: Callable[[], Any], device: DeviceInfo) -> Callable[[], Any] | None:
        """A replay of `step`; None while a compilation runs, whose work on the device would disturb recording."""
        if not self._busy.acquire(blocking=False):
            return None
        try:
            return self._capture(step, device)
        finally:
            self._busy.release()


class _Step:
    """One compiled shape. Runs as it is on its first call, which warms it up, and is recorded on the next.

    A recording is of the tensors that it was made with; with others the step runs as it is, and is recorded again.
    """

    def __init__(
        self, code: Callable[..., Any], weights: list[Tensor], num_inputs: int,
        record: Callable[[Callable[[], Any]], Callable[[], Any] | None],
    ) -> None:  # fmt: skip
        """`num_inputs` come before the caches."""
        self._code = code
        self._weights = weights
        self._num_inputs = num_inputs
        self._record = record
        self._inputs: tuple[Tensor, ...] = ()
        self._replay: Callable[[], Any] | None = None
        self._outputs: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Hidden states, scores, and the caches given, written. They hold until the next call."""
        same = len(inputs) == len(self._inputs) and all(map(is_, inputs, self._inputs))
        if not same:
            self._inputs, self._replay = inputs, None
        elif self._replay is None:
            self._replay = self._record(self._run)
        if self._replay is None:
            self._run()
        else:
            self._replay()
        return [*self._outputs, *inputs[self._num_inputs :]]

    def _run(self) -> None:
        self._outputs = list(self._code(*self._weights, *self._inputs))


def lower(program: StepProgram, name: str) -> tuple[_Interface, fx.GraphModule]:
    """The step as a graph for Inductor: weights, then the step's inputs, to hidden states and scores.

    Kernels are called under names that begin with `name`. Raises PlatformError for a program that does not return its
    caches.
    """
    exported = program.inlined()
    module = exported.graph_module
    operators, sites = _call_kernels(module.graph, name)
    weights, inputs = _inputs(exported)
    _apart([*weights, *inputs])
    _write_in_place(module.graph, inputs[len(program.inputs) :])
    kept = _merge_tied(module.graph, weights, program)
    module.graph.lint()
    module.recompile()
    return _Interface(kept, operators, sites), module


def _kernel_name(name: str, site: str) -> str:
    return f"{name}/{site}"


def _call_kernels(graph: fx.Graph, name: str) -> tuple[list[str], list[str]]:
    """Put operators that call kernels in place of opaque nodes. The operators' schemas, and the sites."""
    operators: dict[str, None] = {}
    sites: list[str] = []
    for node in list(graph.nodes):
        if node.op != "call_function" or getattr(node.target, "namespace", "") != "hotplug":
            continue
        *args, site = node.args
        schema = opaque.schema_of(node.target)
        operators[schema] = None
        sites.append(site)
        with graph.inserting_before(node):
            call = graph.call_function(opaque.operator(schema), (*args, _kernel_name(name, site)))
        name_of_op = node.target._schema.name.split("::")[1]
        if name_of_op in opaque.WRITTEN:
            _use_given(graph, node, call, name_of_op)
        else:
            call.meta.update(node.meta)
            node.replace_all_uses_with(call)
        graph.erase_node(node)
    return list(operators), sites


def _use_given(graph: fx.Graph, node: fx.Node, call: fx.Node, op: str) -> None:
    """In place of the results of `node`, whose op writes in place: the tensors given to `call`, and its new ones."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    new = opaque.new_results(op)
    for use in list(node.users):
        assert use.target is getitem
        index = use.args[1]
        written = opaque.WRITTEN[op][index]  # type: ignore[index]
        if written is not None:
            result = call.args[names.index(written)]
        elif len(new) == 1:
            result = call
        else:
            with graph.inserting_after(call):
                result = graph.call_function(getitem, (call, new.index(index)))  # type: ignore[arg-type]
        if written is None:
            result.meta.update(use.meta)
        use.replace_all_uses_with(result)
        graph.erase_node(use)


def _inputs(exported: torch.export.ExportedProgram) -> tuple[dict[fx.Node, str], list[fx.Node]]:
    """The placeholders of weights, with their names, and those of the step's inputs, in order."""
    places = [node for node in exported.graph.nodes if node.op == "placeholder"]
    weights: dict[fx.Node, str] = {}
    inputs = []
    for node, spec in zip(places, exported.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert spec.target is not None
            weights[node] = spec.target
        else:
            raise PlatformError(f"a step program with a {spec.kind.name.lower()} input", where=str(spec.target))
    return weights, inputs


def _apart(places: list[fx.Node]) -> None:
    """Describe each input as a tensor with memory of its own, from its beginning.

    The caches are views of one allocation. Told so, Inductor makes an operator that writes to two of them take a base
    and offsets, copies the base before and after, and counts the offsets twice (torch 2.11); they do not overlap.
    """
    for node in places:
        given = node.meta["val"]
        if isinstance(given, Tensor):
            node.meta["val"] = given.new_empty_strided(given.shape, given.stride())


def _write_in_place(graph: fx.Graph, caches: list[fx.Node]) -> None:
    """End with hidden states and scores; a cache that comes back as another tensor is copied into the one given.

    Inductor leaves such a copy out where what made the other can write in place, as an index_put can.
    """
    (output,) = (node for node in graph.nodes if node.op == "output")
    hidden, logits, *returned = output.args[0]
    if len(returned) != len(caches):
        raise PlatformError(f"a step program of {len(caches)} caches returns {len(returned)}")
    with graph.inserting_before(output):
        for given, result in zip(caches, returned, strict=True):
            if result is not given:
                graph.call_function(torch.ops.aten.copy_.default, (given, result))
    output.args = ((hidden, logits),)
    for node in (hidden, logits):
        node.meta["example_value"] = node.meta["val"]  # Inductor takes the tensors' fake mode from here


def _merge_tied(graph: fx.Graph, weights: dict[fx.Node, str], program: StepProgram) -> list[str]:
    """Leave out weights that nothing reads and second names of one memory; the names that are kept, in order."""
    first: dict[tuple[Any, ...], fx.Node] = {}
    kept = []
    for node, name in weights.items():
        tensor = program.weights[name]
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        same = first.setdefault(key, node) if tensor.numel() else node
        if same is not node:
            node.replace_all_uses_with(same)
    for node, name in weights.items():
        if node.users:
            kept.append(name)
        else:
            graph.erase_node(node)
    return kept


def _compiled(module: fx.GraphModule) -> Any:
    """Inductor's artifact of a graph; its inputs are the graph's own fake tensors, so nothing is read or allocated."""
    examples = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    return torch._inductor.standalone_compile(
        module, examples, dynamic_shapes="from_graph", options={"config_patches": OPTIONS}
    )


def _loaded(path: Path) -> Callable[..., Any]:
    return torch._inductor.CompiledArtifact.load(path=str(path), format="binary")


def _save(artifact: Any, path: Path) -> None:
    part = path.with_suffix(f".{os.getpid()}")
    artifact.save(path=str(part), format="binary")
    part.replace(path)


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(text)
    part.replace(path)
