"""What a request may say: every value is checked where it enters, and what is refused is named in one sentence."""

from __future__ import annotations

import enum
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotplug.core.engine import messages
from hotplug.core.errors import RequestError
from hotplug.core.request import (
    MAX_CACHE_SALT_CHARS,
    MAX_LOGIT_BIAS,
    MAX_PROCESSORS,
    MAX_PROCESSORS_DEPTH,
    MAX_PROCESSORS_SIZE,
    MAX_STOP,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    Request,
    SamplingParams,
)

HALF = "\ud83d"


class Text(str):
    """A string of another class, which no encoder knows."""

    def __str__(self) -> str:
        return HALF


class Number(enum.IntEnum):
    THREE = 3


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


INTEGERS = ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "speculative")
NO_INTEGERS = [
    2**63,
    2**64,
    10**5000,
    -(2**63) - 1,
    2.0,
    True,
    np.bool_(True),
    "5",
    Decimal(5),
    [5],
    float("nan"),
    b"5",
]
NO_FLOATS = [math.inf, -math.inf, math.nan, 10**400, True, "1", Decimal(1), [1.0], 1j, np.float32("nan")]
NO_FLAGS = [0, 1, "true", 1.0, [], object()]
WRONG: list[tuple[str, Any]] = [
    *[(name, value) for name in INTEGERS for value in NO_INTEGERS],
    *[(name, value) for name in FLOATS for value in NO_FLOATS],
    *[(name, value) for name in FLAGS for value in NO_FLAGS],
    *[("n", value) for value in (0, -1, 129, None)],
    *[("max_tokens", value) for value in (0, -1, 2**31)],
    *[(name, value) for name in ("min_tokens", "top_k") for value in (-1, 2**31, None)],
    *[(name, value) for name in ("logprobs", "prompt_logprobs") for value in (-1, 21)],
    *[(name, None) for name in (*FLOATS, "ignore_eos", "skip_special_tokens")],
    *[("temperature", value) for value in (-0.1, 100.1)],
    *[("top_p", value) for value in (0, 1.1)],
    *[("repetition_penalty", value) for value in (0, -1, 1e-30, 1e30, 1e-300)],
    *[("presence_penalty", value) for value in (-2.1, 2.1)],
    *[("stop", value) for value in (5, b"end", [b"end"], [1], [""], "", {"a": 1}, [HALF], HALF, Text(HALF), [None],
                                    ["a"] * (MAX_STOP + 1), "a" * (MAX_STOP_CHARS + 1), np.array("a"))],
    *[("stop_token_ids", value) for value in (5, "5", [-1], [2**31], [2**64], [1.0], [True], ["1"], {1: 2}, [[1]],
                                              np.array([1.5]), np.array(5), range(MAX_STOP_TOKEN_IDS + 1))],
    *[("logit_bias", value) for value in ([1], {-1: 1}, {2**31: 1}, {2**64: 1}, {1.5: 1}, {True: 1}, {"x": 1},
                                          {"-1": 1}, {"²": 1}, {"9" * 5000: 1}, {1: 101}, {1: math.nan}, {1: "1"},
                                          {1: math.inf}, {1: True}, {1: None}, {1: 10**400}, {None: 1}, "1",
                                          dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0))],
    *[("logits_processors", value) for value in (
        "x", ["x"], {"x": 1}, {1: {}}, {"x": {1: 2}}, {"x": {"a": 2**63}}, {"x": {"a": [{"b": 2**64}]}},
        {"x": {"a": -(2**63) - 1}}, {"x": {"a": math.nan}}, {"x": {"a": math.inf}}, {"x": {"a": HALF}}, {HALF: {}},
        {"x": {HALF: 1}}, {"x": {"a": object()}}, {"x": {"a": b"x"}}, {"x": {"a": {1, 2}}}, {"x": {"a": Text(HALF)}},
        {str(i): {} for i in range(MAX_PROCESSORS + 1)}, {**{str(i): {} for i in range(MAX_PROCESSORS - 1)}, "x": 1},
        {"x": {"a": nested(MAX_PROCESSORS_DEPTH)}}, {"x": {"a": nested(100_000)}},
        {"x": {"a": [0] * MAX_PROCESSORS_SIZE}}, {"x": {"a": "a" * MAX_PROCESSORS_SIZE}},
        {str(i): {} for i in range(MAX_PROCESSORS_SIZE)}, {"x": {"a": np.zeros(3)}}, {"x": {"a": Decimal(1)}})],
]  # fmt: skip


@pytest.mark.parametrize("name", sorted({name for name, _ in WRONG}))
def test_what_a_parameter_cannot_be_is_refused_by_its_name_in_one_short_sentence(name: str) -> None:
    for value in (value for of, value in WRONG if of == name):
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: value})
        assert caught.value.param == name and str(caught.value).startswith(name), value
        assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
        str(caught.value).encode()


REQUEST_WRONG: list[tuple[str, Any]] = [
    *[("id", value) for value in (5, None, HALF, b"a", "a" * 2000)],
    *[("sampling", value) for value in (None, {}, 5)],
    *[("eos_token_ids", value) for value in (5, [1.0], ["1"], [2**64], [True])],
    *[("priority", value) for value in (2**31, 2**63, 2**2000, -(2**31) - 1, 1.0, True, None, "1")],
    *[("cache_salt", value) for value in (HALF, 5, None, b"a", "a" * (MAX_CACHE_SALT_CHARS + 1))],
    *[("arrival", value) for value in (math.nan, math.inf, "1", None, 10**400)],
    *[("tag", value) for value in (-1, 2**63, 2**70, 1.0, True)],
]


def request(**values: Any) -> Request:
    return Request(**{"id": "r", "prompt_token_ids": [1, 2], "sampling": SamplingParams(), **values})


@pytest.mark.parametrize("name", sorted({name for name, _ in REQUEST_WRONG}))
def test_so_is_what_a_request_cannot_have(name: str) -> None:
    for value in (value for of, value in REQUEST_WRONG if of == name):
        with pytest.raises(RequestError) as caught:
            request(**{name: value})
        assert caught.value.param == name, value


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
    | st.sampled_from([2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63), HALF, Decimal("nan"), object(),
                       len, int, np.float32(1), np.int8(-1), np.arange(3), np.array(1), np.array(["a"])]),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(
        st.none() | st.text() | st.integers() | st.floats() | st.binary(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(deadline=None, max_examples=500, derandomize=True)
@given(name=st.sampled_from(SamplingParams.__struct_fields__), value=ODD)
def test_anything_is_either_refused_by_name_or_arrives_in_another_process_as_it_was_taken(
    name: str, value: object
) -> None:
    try:
        params = SamplingParams(**{name: value})  # type: ignore[arg-type]
    except RequestError as e:
        assert e.param in (name, "min_tokens")
        return
    assert msgspec.msgpack.decode(messages.encode(params), type=SamplingParams) == params


def test_min_tokens_may_not_be_above_max_tokens() -> None:
    with pytest.raises(RequestError, match="min_tokens must be at most max_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_one_stop_string_is_one_and_none_is_none() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "é"]).stop == ("a", "é")  # type: ignore[arg-type]
    empty = SamplingParams(stop=None, stop_token_ids=None, logit_bias={}, logits_processors={})  # type: ignore[arg-type]
    assert empty == SamplingParams()


def test_token_ids_of_logit_bias_may_be_text_as_in_json() -> None:
    assert SamplingParams(logit_bias={"5": 1, 7: -2}).logit_bias == {5: 1.0, 7: -2.0}  # type: ignore[dict-item]


def test_numbers_of_numpy_and_of_other_classes_become_pythons() -> None:
    given: dict[str, Any] = {
        "n": np.int64(2), "top_k": np.uint8(3), "max_tokens": Number.THREE, "seed": np.int64(-1), "top_p": 1,
        "min_p": np.float32(0.5), "temperature": Fraction(1, 2), "stop_token_ids": np.array([4, 5]),
        "ignore_eos": np.bool_(True), "logit_bias": {np.int32(3): np.float64(1.5)}, "stop": (Text("x"),),
        "logits_processors": {Text("p"): {"a": (np.int64(1), np.float64(0.5), True, None, Text("y"))}},
    }  # fmt: skip
    params = SamplingParams(**given)
    assert params == SamplingParams(
        n=2, top_k=3, max_tokens=3, seed=-1, min_p=0.5, temperature=0.5, top_p=1.0, stop_token_ids=(4, 5),
        ignore_eos=True, logit_bias={3: 1.5}, stop=("x",), logits_processors={"p": {"a": [1, 0.5, True, None, "y"]}},
    )  # fmt: skip
    kinds = {name: type(getattr(params, name)) for name in given}
    assert set(kinds.values()) <= {int, float, bool, tuple, dict}
    assert msgspec.msgpack.decode(messages.encode(params), type=SamplingParams) == params


def test_what_is_changed_after_the_check_is_not_what_was_checked() -> None:
    biases, arguments = {5: 1.0}, {"p": {"a": [1]}}
    params = SamplingParams(logit_bias=biases, logits_processors=arguments)
    biases[-1] = math.nan
    arguments["p"]["a"].append(2**70)
    assert (params.logit_bias, params.logits_processors) == ({5: 1.0}, {"p": {"a": [1]}})


def test_the_largest_values_are_taken_and_sent() -> None:
    params = SamplingParams(
        n=128, max_tokens=2**31 - 1, min_tokens=2**31 - 1, top_k=2**31 - 1, seed=-(2**63), logprobs=20,
        prompt_logprobs=20, repetition_penalty=1000.0, stop=("é" * MAX_STOP_CHARS,) * MAX_STOP,
        stop_token_ids=tuple(range(MAX_STOP_TOKEN_IDS)), logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), -100.0),
        logits_processors={"x": {"a": nested(MAX_PROCESSORS_DEPTH - 2), "b": [2**63 - 1, -(2**63), 1e308]}},
    )  # fmt: skip
    assert msgspec.msgpack.decode(messages.encode(params), type=SamplingParams) == params


def test_a_temperature_that_float32_cannot_divide_by_is_greedy() -> None:
    assert SamplingParams(temperature=1e-300).temperature == 0.0
    assert SamplingParams(temperature=1e-3).temperature == 1e-3
