"""One step as a `torch.export` program, of static shape or of varying sizes, for platforms that compile."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hotplug.core.layers.context import BuildContext
from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.models.decoder import Decoder
from hotplug.core.ops.inputs import StepInputs
from hotplug.core.ops.plan import COMPOSED, Plan
from hotplug.core.ops.program import as_node, references
from hotplug.core.ops.reference import without_constants
from hotplug.core.ops.registry import REFERENCE, Bucket, Fact, Fn, Op, SiteSpec
from hotplug.core.runner.dynamic import DynamicInputs
from hotplug.core.runner.schema import by_lane, from_tensors
from hotplug.core.runner.static import StaticInputs, StepShape

_TRACING = threading.RLock()
"""Torch's tracer is one for the process, and engines beside each other compile in threads of their own."""


class ModelProgram:
    """Programs of one model, a shape at a time.

    `context` is what the model was built with; `plan` says which sites have kernels.
    """

    def __init__(self, model: Decoder, context: BuildContext, plan: Plan, kv: Sequence[KVBlocks]) -> None:
        self._source = model
        self._context = context
        self._plan = plan
        self.caches = [cache for blocks in kv for cache in blocks]
        self.sides = len(kv[0])
        self.weights = {f"model.{name}": t for name, t in _tensors(model)}

    @cached_property
    def nodes(self) -> tuple[Decoder, dict[str, Op]]:
        """The model with nodes for ops, sharing the weights, and the ops that have a node."""
        binder = _NodeBinder(self._plan)
        context = dataclasses.replace(self._context, plan=binder, device=torch.device("meta"))
        model = type(self._source)(context, self._source.config)
        for target, source in zip(model.modules(), self._source.modules(), strict=True):
            target._parameters.update(source._parameters)
            target._buffers.update(source._buffers)
        return model, binder.ops

    def kernels(self, shape: StepShape) -> dict[str, Fn]:
        """The planned kernel of each site in a step of this shape, called as the nodes are; references left out."""
        bucket = Bucket(shape.num_tokens, 1 if shape.decodes else shape.num_tokens)
        found = {}
        for choice in self._plan.choices:
            impls = {impl.provider: impl for impl in self._plan.registry.impls(choice.spec.op)}
            for provider in choice.provider.split("+"):
                impl = impls.get(provider)
                if impl is not None and (impl.accepts is None or impl.accepts(bucket)):
                    found[choice.spec.site] = self._with_constants(choice.spec, provider)
                    break
        return found

    def _with_constants(self, spec: SiteSpec, provider: str) -> Fn:
        """The site's kernel, called as its node is: with the static parameters too."""
        return without_constants(self._plan.registry.op(spec.op), self._plan.kernel(spec.site, provider))


class ExportedStep:
    """Implements `hotplug.core.platform.program.StepProgram` for one shape."""

    def __init__(self, model: ModelProgram, inputs: StaticInputs | DynamicInputs) -> None:
        self._model = model
        self._inputs = inputs
        self.inputs = inputs.schema
        self.num_tokens, self.num_requests = inputs.shape
        self.weights: Mapping[str, Tensor] = model.weights
        self.caches: Sequence[Tensor] = model.caches
        self.kernels: Mapping[str, Callable[..., Any]] = model.kernels(inputs.shape)

    @torch.no_grad()
    def export(self) -> torch.export.ExportedProgram:
        model, _ = self._model.nodes
        inputs, caches = self._inputs, self._model.caches
        dynamic = isinstance(inputs, DynamicInputs)
        step = (_DynamicStep if dynamic else _Step)(model, inputs.max_query_len, len(inputs.schema), self._model.sides)
        dims = (inputs.dims(len(caches)),) if isinstance(inputs, DynamicInputs) else None
        with _TRACING:
            return torch.export.export(step, (*inputs.examples, *caches), dynamic_shapes=dims, strict=False)

    @torch.no_grad()
    def inlined(self) -> torch.export.ExportedProgram:
        _, ops = self._model.nodes
        with _TRACING:
            return self.export().run_decompositions(dict(references(ops.values(), keep=self.kernels.keys())))


class _NodeBinder:
    """Binds call sites to nodes; an op that the plan lowered to kernels is lowered here too."""

    def __init__(self, plan: Plan) -> None:
        self._registry = plan.registry
        self._composed = {c.spec.site: c.spec for c in plan.choices if c.provider == COMPOSED}
        self._lowered = {c.part_of for c in plan.choices if c.provider not in (REFERENCE, COMPOSED)}
        self.ops: dict[str, Op] = {}

    def bind(self, op: str, site: str, dtype: str, **facts: Fact) -> Fn:
        definition = self._registry.op(op)
        if site in self._composed and site in self._lowered:
            assert definition.lower is not None

            def bind_part(name: str, part: str, **facts: Fact) -> Fn:
                return self.bind(name, f"{site}.{part}", dtype, **facts)

            return definition.lower(bind_part, self._composed[site])
        self.ops[op] = definition
        return as_node(definition, site, facts)


class _Step(nn.Module):
    """A step of static shape as a function of tensors alone."""

    def __init__(self, model: Decoder, max_query_len: int, inputs: int, sides: int) -> None:
        """`inputs` is the number of tensors before the caches, `sides` the number of caches of a lane."""
        super().__init__()
        self.model = model
        self._max_query_len = max_query_len
        self._inputs = inputs
        self._sides = sides

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        step, caches = from_tensors(tensors[: self._inputs], self._max_query_len), tensors[self._inputs :]
        hidden, caches = self._hidden(step, caches)
        return hidden, self.model.logits(hidden[step.logit_indices]), *caches

    def _hidden(self, step: StepInputs, caches: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states of all tokens, and the caches with the step written."""
        hidden, written = self.model(step, by_lane(caches, self._sides))
        return hidden, tuple(cache for blocks in written for cache in blocks)


class _DynamicStep(_Step):
    """A step of varying sizes, which answers with the hidden states that it is asked to keep."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        *given, kept = tensors[: self._inputs]
        step = from_tensors(given, self._max_query_len)
        hidden, caches = self._hidden(step, tensors[self._inputs :])
        hidden = hidden[kept]
        return hidden, self.model.logits(hidden[step.logit_indices]), *caches


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name, shared ones under each of their names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
