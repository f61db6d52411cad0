"""Bisecting a wrong result: the first call site whose output leaves its op's reference.

One prompt runs greedily, op by op. Every call's inputs are copied to the host first; the op's reference computes
the same there, and what the kernel returned and left in its arguments is compared with what the reference did. So
each call is judged on the inputs that it really had, and an error upstream blames nobody downstream. Whether the
culprit found explains the wrong tokens is then tried out, with the reference in its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import HotplugError, RequestError
from hotplug.core.ops.compare import Comparison, compare, describe, dtypes_through, leaves
from hotplug.core.ops.reference import bound_reference, call_parameters
from hotplug.core.ops.registry import REFERENCE, Fact, Fn, Observe, Op, SiteSpec
from hotplug.core.platform.base import ExecMode
from hotplug.core.request import Request, SamplingParams
from hotplug.core.startup.bind import Bound, bind

HOST = torch.device("cpu")  # where references run: PyTorch's own, which every platform is measured against


@dataclass(slots=True)
class SiteResult:
    """How one kernel did at one site, over all of its calls."""

    site: str
    op: str
    provider: str
    dtype: str
    facts: dict[str, Fact]
    calls: int = 0
    wrong_calls: int = 0
    step: int = 0
    """The step of the worst call until one is wrong, then of the first wrong one; as everything below."""
    inputs: list[str] = field(default_factory=list)
    """Dtype and shape of each input tensor."""
    what: str = ""
    """Which tensor: "output", "output[1]", or the name of an argument that was left otherwise."""
    comparison: Comparison = field(default_factory=lambda: Comparison(0.0))


@dataclass(frozen=True, slots=True)
class Bisection:
    """What was found."""

    platform: str
    reference: str
    dtype: str
    expected: list[int]
    """Tokens of the reference platform, every op by its reference."""
    tokens: list[int]
    """Tokens of the platform, op by op."""
    exec_mode: str
    whole: list[int] | None
    """Tokens of the platform in its own execution mode, where that is another than eager."""
    unlike: list[tuple[str, str, str]]
    """Site, kernel compared, kernel in the platform's own execution mode, where the two are not the same."""
    compared: int
    """Calls that were compared; a reference on the host is not compared with itself."""
    sites: list[SiteResult]
    """Every kernel that was compared: divergent ones in the order of their first wrong call, then the others."""
    repaired_by_first: bool | None
    """Whether the expected tokens come back with the first divergent site on its reference; None: not tried."""
    repaired_by_all: bool | None

    @property
    def divergent(self) -> list[SiteResult]:
        """What left its reference, in the order of the first wrong call."""
        return [s for s in self.sites if s.wrong_calls]


class Comparer:
    """Puts a comparison around every bound callable. `step` is set by whoever drives the engine."""

    def __init__(self) -> None:
        self.step = 0
        self.compared = 0
        self._failures = 0
        self.results: dict[tuple[str, str], SiteResult] = {}
        self.wrong: list[tuple[str, str]] = []
        """Keys of `results` in the order of the first wrong call."""
        self._weights: dict[int, Tensor] = {}

    def observe(self, op: Op, spec: SiteSpec, provider: str, fn: Fn) -> Fn:
        """Implements `hotplug.core.ops.registry.Observe`."""
        names = call_parameters(op)
        reference = bound_reference(op, spec.facts)

        def compared(*args: Any) -> Any:
            if provider == REFERENCE and _all_on_host(args):
                return fn(*args)
            copies = [self._to_host(a) for a in args]
            failures = self._failures
            try:
                result = fn(*args)
            except HotplugError:
                raise
            except Exception as e:
                raise HotplugError(
                    f"kernel {provider} of {spec.op} raised an exception",
                    where=spec.site,
                    why=f"{type(e).__name__}: {e}",
                    hint=f"Try --force {spec.site}=reference.",
                ) from e
            if self._failures == failures:  # else a part of this op is wrong, and is the one to blame
                expected = reference(*copies)
                checks = [("output", result, expected), *zip(names, args, copies, strict=False)]
                self._judge(spec, provider, args, checks)
            return result

        return compared

    def _judge(
        self, spec: SiteSpec, provider: str, args: tuple[Any, ...], checks: Sequence[tuple[str, Any, Any]]
    ) -> None:
        self.compared += 1
        key = (spec.site, provider)
        new = SiteResult(spec.site, spec.op, provider, spec.dtype, dict(spec.facts))
        result = self.results.setdefault(key, new)
        result.calls += 1
        what, worst = max(_compared(spec, checks), key=lambda found: found[1].excess, default=("", Comparison(0.0)))
        telling = not result.wrong_calls and (not worst.ok or worst.excess >= result.comparison.excess)
        if not worst.ok:
            self._failures += 1
            result.wrong_calls += 1
            if result.wrong_calls == 1:
                self.wrong.append(key)
        if telling:
            result.step, result.what, result.comparison = self.step, what, worst
            result.inputs = describe(args)

    def _to_host(self, value: Any) -> Any:
        """A copy on the host that the kernel cannot reach; weights, which no kernel may change, are copied once."""
        if isinstance(value, nn.Parameter):
            return self._weights.setdefault(id(value), value.detach().to(HOST))
        if isinstance(value, Tensor):
            return value.detach().to(HOST, copy=True)
        if isinstance(value, tuple | list):
            return type(value)(self._to_host(item) for item in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            copied = {f.name: self._to_host(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
            return dataclasses.replace(value, **copied)
        return value


def bisect(config: EngineConfig, prompt: Sequence[int], *, reference: str, max_tokens: int) -> Bisection:
    """Run `prompt` on the platform of `config` and judge every call; `reference` is the platform to trust.

    Runs the model three to five times. Raises what starting an engine raises, and RequestError.
    """
    bound, small = _fitted(config, len(prompt) + max_tokens)
    resolved = bound.options.resolved
    eager = dataclasses.replace(small, exec="eager")
    _, trusted = _fitted(
        dataclasses.replace(eager, device=reference, block_size=None, force=("*=reference",)), len(prompt) + max_tokens
    )
    expected = _tokens(trusted, prompt, max_tokens)
    comparer = Comparer()
    tokens = _tokens(eager, prompt, max_tokens, comparer=comparer)
    whole, unlike = None, []
    if resolved.exec_mode is not ExecMode.EAGER:
        whole = _tokens(small, prompt, max_tokens)
        alone = {c.spec.site: c.provider for c in bind(eager, meta=True).kernels.plan.choices}
        unlike = [(c.spec.site, alone.get(c.spec.site, "none"), c.provider)
                  for c in bound.kernels.plan.choices if alone.get(c.spec.site) != c.provider]  # fmt: skip

    divergent = [comparer.results[key] for key in comparer.wrong]
    first = all_of_them = None
    if tokens != expected:
        repairable = [s.site for s in divergent if s.provider != REFERENCE]
        if repairable and repairable[0] == divergent[0].site:
            first = _tokens(eager, prompt, max_tokens, observe=_instead(repairable[:1])) == expected
        if len(repairable) > 1 and not first:
            all_of_them = _tokens(eager, prompt, max_tokens, observe=_instead(repairable)) == expected
    rest = [s for s in comparer.results.values() if not s.wrong_calls]
    return Bisection(
        platform=bound.placement.platform.name, reference=reference, dtype=resolved.dtype, expected=expected,
        tokens=tokens, exec_mode=str(resolved.exec_mode), whole=whole, unlike=unlike, compared=comparer.compared,
        sites=divergent + rest, repaired_by_first=first, repaired_by_all=all_of_them,
    )  # fmt: skip


def _fitted(config: EngineConfig, length: int) -> tuple[Bound, EngineConfig]:
    """The plan of `config`, and `config` for one request of `length` tokens with a cache no larger than that takes.

    Caches are copied at every call, so their size is what a bisection's time goes by.
    """
    bound = bind(dataclasses.replace(config, trace_ops=False), meta=True)
    blocks = -(-length // bound.options.resolved.block_size) + 2
    fitting: dict[str, Any] = {
        "dtype": bound.options.resolved.dtype,
        "kv_cache_dtype": bound.options.resolved.kv_dtype,
        "quantization": bound.kernels.weights.name,
        "kv_cache_memory": blocks * bound.kv.block_bytes,
        "max_model_len": length,
        "max_num_seqs": 1,
        "swap_space": None,
        "enable_prefix_cache": False,
        "trace_ops": False,
    }
    return bound, dataclasses.replace(config, **fitting)


def _tokens(
    config: EngineConfig,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    comparer: Comparer | None = None,
    observe: Observe | None = None,
) -> list[int]:
    """Greedy tokens of a fresh engine."""
    core = EngineCore(config, observe=comparer.observe if comparer is not None else observe)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    core.add(Request(id="bisect", prompt_token_ids=list(prompt), sampling=sampling))
    tokens: list[int] = []
    while core.has_work:
        if comparer is not None:
            comparer.step += 1
        for delta in core.step():
            if delta.finish_reason == "error":
                raise HotplugError("the prompt could not be run", why=delta.error)
            tokens += delta.token_ids
    if not tokens:
        raise RequestError("the prompt gave no token", param="prompt")
    return tokens


def _instead(sites: Collection[str]) -> Observe:
    """An observer that puts the reference in the place of whatever serves these sites."""

    def observe(op: Op, spec: SiteSpec, provider: str, fn: Fn) -> Fn:
        return bound_reference(op, spec.facts) if spec.site in sites else fn

    return observe


def _compared(spec: SiteSpec, checks: Sequence[tuple[str, Any, Any]]) -> list[tuple[str, Comparison]]:
    """Each tensor of what a kernel gave, by name, against the same of the reference."""
    through = dtypes_through(spec)
    found = []
    for name, actual, expected in checks:
        if isinstance(actual, nn.Parameter):
            continue
        given = dict(leaves(name, actual))
        for part, tensor in leaves(name, expected):
            if part not in given:
                found.append((part, Comparison(float("inf"), reason="not a tensor, the reference gives one")))
            else:
                found.append((part, compare(given[part], tensor, through=through)))
    return found


def _all_on_host(args: Sequence[Any]) -> bool:
    return all(t.device == HOST for a in args for _, t in leaves("", a))
