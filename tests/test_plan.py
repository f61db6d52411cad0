"""The plan: which kernel serves which call site, why, and what is an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from whole_calls import reference_kernel

from hotplug.core.errors import PlanError
from hotplug.core.ops import norm
from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.plan import Plan
from hotplug.core.ops.registry import Bucket, Impl, Op, OpRegistry, SiteSpec, Verdict

NORM = {"width": 8, "eps": 0.0}


def kernel(provider: str = "acme", op: str = "rms_norm", **options: Any) -> Impl:
    """A kernel that answers its own provider's name."""
    return Impl(op, provider, make=lambda _: lambda *_: provider, **options)


def no(reason: str) -> Callable[[SiteSpec], Verdict]:
    return lambda _: Verdict(False, reason)


def make_plan(*kernels: Impl, force: tuple[str, ...] = (), arch: str = "v1") -> Plan:
    registry = builtin_registry()
    for impl in kernels:
        registry.add(impl)
    return Plan(registry, arch=arch, force=force)


def providers(plan: Plan) -> dict[str, str]:
    return {c.spec.site: c.provider for c in plan.choices}


# --- choosing -------------------------------------------------------------------------------------


def test_the_highest_rank_whose_check_says_ok_wins() -> None:
    low, high, refused = kernel("low"), kernel("high", rank=5), kernel("refused", rank=9, check=no("width 8 < 16"))
    plan = make_plan(low, high, refused)
    plan.bind("rms_norm", "a", "float32", **NORM)
    (choice,) = plan.choices
    assert (choice.provider, choice.reason) == ("high", "rank 5")
    assert [(r.provider, r.reason) for r in choice.rejected] == [
        ("refused", "width 8 < 16"),
        ("low", "outranked by high"),
    ]


def test_the_bound_callable_is_the_one_that_the_kernel_made_of_the_site() -> None:
    made: list[tuple[SiteSpec, Any]] = []

    def make(spec: SiteSpec) -> Any:
        made.append((spec, lambda *_: None))
        return made[-1][1]

    bound = make_plan(Impl("rms_norm", "acme", make=make)).bind("rms_norm", "a", "float32", **NORM)
    assert [(spec, fn is bound) for spec, fn in made] == [(SiteSpec("rms_norm", "a", "float32", "v1", NORM), True)]


def test_a_kernel_that_serves_no_site_is_not_made() -> None:
    def make(spec: SiteSpec) -> Any:
        raise AssertionError("made")

    plan = make_plan(kernel("best", rank=9), Impl("rms_norm", "outranked", make=make),
                     Impl("rms_norm", "refused", make=make, check=no("old"), rank=10))  # fmt: skip
    plan.bind("rms_norm", "a", "float32", **NORM)
    plan.finish()


def test_a_kernel_that_cannot_be_made_is_an_error_with_the_reason() -> None:
    def make(spec: SiteSpec) -> Any:
        raise RuntimeError("no such tile")

    (why,) = errors(make_plan(Impl("rms_norm", "acme", make=make)))
    assert why == "a: kernel acme cannot be made: RuntimeError: no such tile"


def test_what_a_kernel_makes_must_be_a_function() -> None:
    (why,) = errors(make_plan(Impl("rms_norm", "acme", make=lambda spec: spec["eps"])))
    assert why == "a: kernel acme: its make gives float, no function"


def test_without_a_kernel_the_reference_is_bound_with_the_facts_of_the_site() -> None:
    plan = make_plan(kernel(check=no("too old")))
    x, weight = torch.randn(3, 8), torch.randn(8)
    fn = plan.bind("rms_norm", "a", "float32", width=8, eps=0.25)
    assert torch.equal(fn(x, weight), norm.rms_norm(x, weight, 0.25))
    assert providers(plan) == {"a": "reference"}
    assert plan.choices[0].rejected[0].reason == "too old"


def test_check_sees_the_facts_of_the_site() -> None:
    seen: list[SiteSpec] = []

    def check(spec: SiteSpec) -> Verdict:
        seen.append(spec)
        return Verdict(spec["width"] == 8 and spec.arch == "v1")

    make_plan(kernel(check=check)).bind("rms_norm", "layers.3.norm", "bfloat16", **NORM)
    assert seen == [SiteSpec("rms_norm", "layers.3.norm", "bfloat16", "v1", NORM)]


def test_a_check_that_asks_for_an_unknown_fact_is_an_error_with_the_nearest() -> None:
    plan = make_plan(kernel(check=lambda spec: Verdict(spec["widht"] > 1)))
    plan.bind("rms_norm", "a", "float32", **NORM)
    with pytest.raises(PlanError, match=r"a: kernel acme.*no fact 'widht'.*Did you mean 'width'"):
        plan.finish()


# --- shapes ---------------------------------------------------------------------------------------


def test_a_kernel_for_some_shapes_chains_to_the_next() -> None:
    small = kernel("small", rank=9, accepts=lambda b: b.num_tokens <= 4)
    plan = make_plan(small, kernel("any", rank=2), kernel("never"))
    fn = plan.bind("rms_norm", "a", "float32", **NORM)
    assert [fn(torch.zeros(n, 8), None) for n in (4, 5)] == ["small", "any"]
    assert providers(plan) == {"a": "small+any"}


def test_shapes_that_no_kernel_accepts_run_the_reference() -> None:
    plan = make_plan(kernel("two", rank=2, accepts=lambda b: b.num_tokens == 2),
                     kernel("one", accepts=lambda b: b.num_tokens == 1))  # fmt: skip
    fn = plan.bind("rms_norm", "a", "float32", **NORM)
    weight = torch.ones(8)
    assert [fn(torch.ones(n, 8), weight) for n in (1, 2)] == ["one", "two"]
    assert torch.equal(fn(torch.ones(3, 8), weight), torch.ones(3, 8))
    assert providers(plan) == {"a": "two+one+reference"}
    assert plan.reference_sites == plan.choices


def test_attention_buckets_by_tokens_and_longest_query() -> None:
    from attention_cases import make_case

    seen: list[Bucket] = []
    plan = make_plan(kernel(op="attention", accepts=lambda b: bool(seen.append(b)) or True))
    cache = {"num_kv_heads": 2, "head_dim": 8, "block_size": 4, "layout": "NHD", "kv_dtype": "float32"}
    facts = {"num_heads": 4, "scale": 1.0, "window": None, "sinks": False, "soft_cap": None, "static": False, **cache}
    case = make_case([(1, 9), (5, 7)])
    plan.bind("attention", "a", "float32", **facts)(case.q, case.k_cache, case.v_cache, case.step, None)
    assert seen == [Bucket(num_tokens=6, max_query_len=5)]


# --- fused ops ------------------------------------------------------------------------------------


def test_a_fused_op_without_kernel_is_lowered_to_planned_parts() -> None:
    calls: list[torch.Tensor] = []

    def fast_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x * 0

    plan = make_plan(Impl("rms_norm", "acme", make=lambda _: fast_norm))
    fn = plan.bind("add_rms_norm", "n", "float32", **NORM)
    normed, total = fn(torch.ones(2, 8), torch.ones(2, 8), torch.ones(8))
    assert providers(plan) == {"n": "composed", "n.norm": "acme"}
    assert plan.choices[1].part_of == "n"
    assert torch.equal(calls[0], total) and total.eq(2).all() and not normed.any()


@pytest.mark.parametrize("claimed", [True, False])
def test_a_lowered_op_equals_its_reference(claimed: bool) -> None:
    from hotplug.core.ops.rope import qk_norm_rope

    plan = make_plan(*[reference_kernel("rms_norm", "acme")] * claimed)
    facts = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rotary_dim": 8, "eps": 1e-5}
    heads = (torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(8), torch.randn(8))
    places = (torch.tensor([4, 0, 2]), torch.randn(5, 8))
    found = plan.bind("qk_norm_rope", "r", "float32", **facts)(*heads, *places)
    for actual, expected in zip(found, qk_norm_rope(*heads, 1e-5, *places), strict=True):
        assert torch.equal(actual, expected)


def test_a_kernel_that_claims_the_fused_op_serves_it_whole() -> None:
    fused = kernel("fused", op="add_rms_norm")
    plan = make_plan(fused, kernel("small"))
    assert plan.bind("add_rms_norm", "n", "float32", **NORM)() == "fused"
    assert providers(plan) == {"n": "fused"}


def test_a_fused_kernel_for_some_shapes_leaves_the_others_to_planned_parts() -> None:
    fused = kernel("fused", op="add_rms_norm", rank=9, accepts=lambda bucket: bucket.num_tokens == 1)
    norm_of_many = Impl("rms_norm", "acme", make=lambda _: lambda x, weight: x * 0)
    plan = make_plan(fused, norm_of_many)
    fn = plan.bind("add_rms_norm", "n", "float32", **NORM)
    plan.finish()
    assert providers(plan) == {"n": "fused+composed", "n.norm": "acme"}
    assert plan.choices[0].reason == "rank 9, other shapes to its parts"
    assert fn(torch.ones(1, 8), torch.ones(1, 8), torch.ones(8)) == "fused"
    normed, total = fn(torch.ones(2, 8), torch.ones(2, 8), torch.ones(8))
    assert total.eq(2).all() and not normed.any()


def test_parts_behind_a_fused_kernel_can_be_references_and_count_as_such() -> None:
    plan = make_plan(kernel("fused", op="add_rms_norm", accepts=lambda bucket: bucket.num_tokens == 1))
    fn = plan.bind("add_rms_norm", "n", "float32", width=8, eps=1e-5)
    arguments = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    for actual, expected in zip(fn(*arguments), norm.add_rms_norm(*arguments, 1e-5), strict=True):
        assert torch.equal(actual, expected)
    assert "n.norm" in {choice.spec.site for choice in plan.reference_sites}


# --- forcing --------------------------------------------------------------------------------------


def test_a_forced_provider_goes_before_a_higher_rank() -> None:
    plan = make_plan(kernel("low"), kernel("high", rank=5), force=("rms_norm=low",))
    assert plan.bind("rms_norm", "a", "float32", **NORM)() == "low"
    assert plan.choices[0].reason == "forced"
    plan.finish()


def test_the_reference_can_be_forced() -> None:
    plan = make_plan(kernel(), force=("rms_norm=reference",))
    plan.bind("rms_norm", "a", "float32", **NORM)
    assert providers(plan) == {"a": "reference"}


def test_a_site_pattern_forces_only_the_sites_it_matches() -> None:
    plan = make_plan(kernel("low"), kernel("high", rank=5), force=("layers.[02].*=low",))
    for i in range(3):
        plan.bind("rms_norm", f"layers.{i}.norm", "float32", **NORM)
    assert list(providers(plan).values()) == ["low", "high", "low"]


def test_a_force_reaches_the_parts_of_a_lowered_op() -> None:
    plan = make_plan(kernel("low"), kernel("high", rank=5), force=("rms_norm=low",))
    plan.bind("add_rms_norm", "n", "float32", **NORM)
    assert providers(plan) == {"n": "composed", "n.norm": "low"}


def test_a_forced_kernel_for_some_shapes_shows_what_the_others_run() -> None:
    plan = make_plan(kernel("one", accepts=lambda b: b.num_tokens == 1), force=("rms_norm=one",))
    plan.bind("rms_norm", "a", "float32", **NORM)
    assert providers(plan) == {"a": "one+reference"}
    assert plan.choices[0].reason == "forced, other shapes to the reference"


def test_what_a_forced_kernel_leaves_goes_to_the_other_kernels_by_rank() -> None:
    one, many = kernel("one", accepts=lambda b: b.num_tokens == 1), kernel("many", rank=5)
    plan = make_plan(one, many, kernel("worse"), force=("rms_norm=one",))
    fn = plan.bind("rms_norm", "a", "float32", **NORM)
    plan.finish()
    assert providers(plan) == {"a": "one+many"}
    assert plan.choices[0].reason == "forced, other shapes by rank"
    assert [fn(torch.ones(rows, 8), torch.ones(8)) for rows in (1, 2)] == ["one", "many"]


# --- errors ---------------------------------------------------------------------------------------


def errors(plan: Plan, *sites: str) -> tuple[str, ...]:
    for site in sites or ("a",):
        plan.bind("rms_norm", site, "float32", **NORM)
    with pytest.raises(PlanError) as caught:
        plan.finish()
    return caught.value.why


def test_a_tie_between_the_best_kernels_is_an_error() -> None:
    (why,) = errors(make_plan(kernel("one", rank=3), kernel("two", rank=3)))
    assert why == "a: kernels one and two of rms_norm tie at rank 3; one must yield, or use --force"


def test_a_tie_behind_the_winner_or_with_a_refusal_is_none() -> None:
    plan = make_plan(kernel("best", rank=9), kernel("one"), kernel("two"), kernel("no", rank=9, check=no("old")))
    plan.bind("rms_norm", "a", "float32", **NORM)
    plan.finish()
    assert providers(plan) == {"a": "best"}


def test_a_force_settles_a_tie() -> None:
    plan = make_plan(kernel("one"), kernel("two"), force=("rms_norm=two",))
    plan.bind("rms_norm", "a", "float32", **NORM)
    plan.finish()


def test_an_unknown_forced_provider_names_the_site_and_the_nearest() -> None:
    (why,) = errors(make_plan(kernel("acme"), force=("rms_norm=acmee",)))
    assert why == "a: forced provider 'acmee' has no kernel for rms_norm; Did you mean 'acme'?"


def test_a_forced_provider_that_refuses_is_an_error_with_its_reason() -> None:
    (why,) = errors(make_plan(kernel(check=no("needs width 16")), force=("rms_norm=acme",)))
    assert why == "a: forced provider 'acme' cannot serve it: needs width 16"


def test_two_forces_on_one_site_are_an_error() -> None:
    (why,) = errors(make_plan(kernel("one"), kernel("two", rank=2), force=("rms_norm=one", "a=two")))
    assert why == "a: forced to several providers: one, two"


def test_a_force_that_matches_nothing_is_an_error_with_the_nearest() -> None:
    (why,) = errors(make_plan(kernel(), force=("rms_nrom=acme",)))
    assert why == "--force rms_nrom=acme: matches no call site; Did you mean 'rms_norm'?"


def test_a_refusal_without_a_reason_is_an_error() -> None:
    (why,) = errors(make_plan(kernel(check=no(""))))
    assert why == "a: kernel acme refused without a reason"


def test_all_sites_and_reasons_are_reported_together() -> None:
    plan = make_plan(kernel("one"), kernel("two"), force=("b=three", "c=one", "d=x"))
    assert len(errors(plan, "a", "b", "c")) == 3


@pytest.mark.parametrize("facts", [{}, {"width": 1, "depth": 2}, {"depth": 2}])
def test_other_facts_than_the_op_declares_are_an_error(facts: dict[str, int]) -> None:
    with pytest.raises(PlanError, match=r"a: the op 'rms_norm' takes the facts \['eps', 'width'\]"):
        make_plan().bind("rms_norm", "a", "float32", **facts)


def test_a_site_bound_twice_is_an_error() -> None:
    plan = make_plan()
    plan.bind("rms_norm", "a", "float32", **NORM)
    with pytest.raises(PlanError, match="a: two call sites have the same name"):
        plan.bind("silu_mul", "a", "float32", width=8)


def test_an_unknown_op_is_an_error_with_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"no op .rms_nrm.\. Did you mean 'rms_norm'"):
        make_plan().bind("rms_nrm", "a", "float32", **NORM)


# --- the registry ---------------------------------------------------------------------------------


def test_a_kernel_of_an_unknown_op_is_refused_with_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"kernel acme of rmsnorm: there is no such op\. Did you mean 'rms_norm'"):
        make_plan(kernel(op="rmsnorm"))


def test_a_provider_registers_one_kernel_an_op() -> None:
    with pytest.raises(PlanError, match="kernel acme of rms_norm: this provider already has a kernel"):
        make_plan(kernel(), kernel(rank=2))


@pytest.mark.parametrize("impl", [kernel("reference"), kernel(rank=0)])
def test_the_references_name_and_rank_are_taken(impl: Impl) -> None:
    with pytest.raises(PlanError, match="belong to the op's own reference"):
        make_plan(impl)


def test_registering_after_the_plan_is_made_is_refused() -> None:
    registry = builtin_registry()
    Plan(registry, arch="v1")
    with pytest.raises(PlanError, match="kernel acme of rms_norm: registered too late"):
        registry.add(kernel())
    with pytest.raises(PlanError, match="op 'new': registered too late"):
        registry.define(Op("new", lambda x: x))


def test_a_kernel_as_interface_1_had_them_is_refused_from_a_platform_that_says_it_is_for_2() -> None:
    from hotplug import vendor

    with pytest.raises(PlanError, match=r"kernel acme of rms_norm: it is a function that takes constants.*make="):
        make_plan(vendor.Impl("rms_norm", "acme", lambda *_: None))  # type: ignore[call-arg, misc]


def test_an_op_is_defined_once() -> None:
    with pytest.raises(PlanError, match="'same' is defined twice"):
        OpRegistry([Op("same", lambda x: x)] * 2)


# --- what a plan tells ----------------------------------------------------------------------------


def hash_of(*kernels: Impl, sites: tuple[str, ...] = ("a", "b"), dtype: str = "float32", **options: Any) -> str:
    plan = make_plan(*kernels, **options)
    for site in sites:
        plan.bind("rms_norm", site, dtype, **NORM)
    return plan.hash


def test_the_hash_changes_with_any_choice() -> None:
    different = [
        hash_of(),
        hash_of(kernel()),
        hash_of(kernel("other")),
        hash_of(kernel(), force=("a=reference",)),
        hash_of(kernel(), sites=("a",)),
        hash_of(kernel(), dtype="bfloat16"),
        hash_of(kernel(), arch="v2"),
    ]
    assert len(set(different)) == len(different)


def test_the_hash_depends_on_nothing_but_the_choices() -> None:
    same = [
        hash_of(kernel()),
        hash_of(kernel(rank=7)),
        hash_of(kernel(rank=2), kernel("losing")),
        hash_of(kernel(), sites=("b", "a")),
        hash_of(kernel(), force=("rms_norm=acme",)),
    ]
    assert len(set(same)) == 1


def test_the_report_is_json_with_an_entry_a_site() -> None:
    plan = make_plan(kernel(), kernel("old", rank=3, check=no("v0 only")))
    plan.bind("add_rms_norm", "n", "float32", **NORM)
    report = json.loads(json.dumps(plan.report()))
    assert report[1] == {
        "site": "n.norm", "op": "rms_norm", "dtype": "float32", "facts": {"width": 8, "eps": 0.0}, "provider": "acme",
        "reason": "rank 1", "part_of": "n", "rejected": [{"provider": "old", "reason": "v0 only"}],
    }  # fmt: skip


def test_reference_sites_are_those_that_can_reach_a_reference() -> None:
    plan = make_plan(kernel())
    plan.bind("add_rms_norm", "n", "float32", **NORM)
    plan.bind("silu_mul", "s", "float32", width=8)
    assert [c.spec.site for c in plan.reference_sites] == ["s"]
