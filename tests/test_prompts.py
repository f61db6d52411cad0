"""What is taken as a prompt, a conversation or parameters, and how everything else is refused: in one sentence."""

from __future__ import annotations

from array import array
from collections import UserDict, deque
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from transformers import BatchEncoding

from hotplug.core.client.prompts import (
    Prompt,
    read_conversations,
    read_messages,
    read_params,
    read_prompt,
    read_prompts,
)
from hotplug.core.errors import RequestError
from hotplug.core.request import SamplingParams

IDS = [5, 6, 7]


def encoding() -> tokenizers.Encoding:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 5, "b": 6, "c": 7}, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return backend.encode("a b c")


ONE = {
    "list": [5, 6, 7],
    "tuple": (5, 6, 7),
    "range": range(5, 8),
    "array module": array("i", [5, 6, 7]),
    "deque": deque([5, 6, 7]),
    "NumPy": np.array([5, 6, 7], np.int32),
    "unsigned": np.array([5, 6, 7], np.uint8),
    "list of NumPy integers": list(np.array([5, 6, 7])),
    "tensor": torch.tensor([5, 6, 7]),
    "list of tensors": list(torch.tensor([5, 6, 7])),
    "batch of one": torch.tensor([[5, 6, 7]]),
    "dict": {"prompt_token_ids": [5, 6, 7]},
    "dict of an array": {"prompt_token_ids": np.array([5, 6, 7])},
    "dict without text": {"prompt": None, "prompt_token_ids": [5, 6, 7]},
    "tokenizer": BatchEncoding({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}),
    "tokenizer, tensors": BatchEncoding({"input_ids": torch.tensor([[5, 6, 7]]), "token_type_ids": torch.zeros(1, 3)}),
    "tokenizer, padded": {"input_ids": [0, 5, 6, 7], "attention_mask": [0, 1, 1, 1]},
    "user's mapping": UserDict(input_ids=[5, 6, 7]),
    "encoding": encoding(),
}


@pytest.mark.parametrize("given", ONE.values(), ids=ONE)
def test_one_prompt_of_token_ids_is_taken(given: Any) -> None:
    for prompt in (read_prompt(given), *read_prompts(given), *read_prompts([given])):
        assert prompt == Prompt(token_ids=IDS)
        assert {type(token) for token in prompt.token_ids or ()} == {int}


@pytest.mark.parametrize(
    "given",
    [
        [[5, 6, 7], [8]],
        ((5, 6, 7), (8,)),
        [np.array([5, 6, 7]), torch.tensor([8])],
        {"input_ids": [[5, 6, 7], [8]]},
        {"input_ids": [torch.tensor([5, 6, 7]), torch.tensor([8])]},
        {"input_ids": torch.tensor([[5, 6, 7], [8, 1, 1]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])},
        {"input_ids": np.array([[5, 6, 7], [8]], dtype=object)},
        (ids for ids in ([5, 6, 7], [8])),
        {"a": [5, 6, 7], "b": [8]}.values(),
        [{"prompt_token_ids": [5, 6, 7]}, {"input_ids": [8]}],
    ],
)
def test_several_prompts_of_token_ids_are_taken(given: Any) -> None:
    assert read_prompts(given) == [Prompt(token_ids=IDS), Prompt(token_ids=[8])]


def test_a_two_dimensional_array_is_several_prompts() -> None:
    assert [p.token_ids for p in read_prompts(np.arange(6).reshape(2, 3))] == [[0, 1, 2], [3, 4, 5]]
    assert read_prompts(torch.empty(0, 4, dtype=torch.int64)) == []


@pytest.mark.parametrize(
    "given", [["a", "b"], ("a", "b"), np.array(["a", "b"]), np.array(["a", "b"], object), iter(["a", "b"]),
              [{"prompt": "a"}, "b"]],
)  # fmt: skip
def test_texts_are_taken(given: Any) -> None:
    assert read_prompts(given) == [Prompt("a"), Prompt("b")]


def test_a_dict_may_have_text_ids_and_a_salt() -> None:
    assert read_prompt({"prompt": "a", "prompt_token_ids": IDS, "cache_salt": "s"}) == Prompt("a", IDS, "s")


def test_forms_may_be_mixed() -> None:
    mixed = ["a", IDS, np.array(IDS), {"prompt": "b"}, BatchEncoding({"input_ids": IDS})]
    ids = Prompt(token_ids=IDS)
    assert read_prompts(mixed) == [Prompt("a"), ids, ids, Prompt("b"), ids]


def test_no_prompts_are_none() -> None:
    assert read_prompts([]) == read_prompts(()) == read_prompts(iter([])) == []


WRONG = {
    "bytes": (b"abc", r"^prompts is bytes b'abc': a prompt is text, token ids,.* Decode bytes to text first\.$"),
    "bytes in a list": ([b"abc"], r"^prompts\[0\] is bytes"),
    "bytearray": (bytearray(b"abc"), "bytearray"),
    "memoryview": (memoryview(b"abc"), "memoryview"),
    "set": ({1, 2}, r"^prompts is set \{1, 2\}"),
    "frozenset": ([frozenset({1})], r"^prompts\[0\] is frozenset"),
    "None": (None, r"^prompts is None: "),
    "None in a list": (["a", None], r"^prompts\[1\] is None: "),
    "number": (7, r"^prompts is int 7: "),
    "number among texts": (["a", 7], r"^prompts\[1\] is int 7: "),
    "text among numbers": ([7, "a"], r"^prompts\[1\] is str 'a': token ids are integers$"),
    "float": ([1.0, 2], r"^prompts\[0\] is float 1.0: token ids are integers$"),
    "bool": ([1, True], r"^prompts\[1\] is bool True: token ids are integers$"),
    "bools": ([[True]], r"^prompts\[0\]\[0\] is bool True"),
    "NumPy bool": ([1, np.True_], r"^prompts\[1\] is bool"),
    "bool tensor in a list": ([1, torch.tensor(True)], r"^prompts\[1\] is Tensor"),
    "float tensor in a list": ([1, torch.tensor(1.5)], r"^prompts\[1\] is Tensor"),
    "float array": (np.array([1.0]), r"^prompts is an array of float64 of shape \[1\]: token ids are integers"),
    "bool array": (np.array([True]), "array of bool"),
    "float tensor": (torch.ones(2), "array of float32"),
    "no dimension": (np.array(3), r"of shape \[\]"),
    "three dimensions": (torch.ones(1, 1, 1, dtype=torch.int64), r"of shape \[1, 1, 1\]"),
    "too deep": ([[[1]]], r"^prompts\[0\] is list \[\[1\]\]: one prompt is expected here"),
    "texts too deep": ([["a"]], r"^prompts\[0\] is list \['a'\]"),
    "unknown keys": ({"text": "a"}, r"^prompts is a dict with 'text', not with 'prompt'"),
    "no keys": ([{}], r"^prompts\[0\] is a dict with no keys"),
    "message": ([{"role": "user", "content": "a"}], r"Give messages to `chat`"),
    "more than is used": ({"prompt": "a", "multi_modal_data": {}}, r"has str .multi_modal_data., which is not"),
    "dict of a number": ({"prompt": 7}, r"^prompts\['prompt'\] is int 7: text is expected$"),
    "dict of bytes": ({"prompt": b"a"}, r"^prompts\['prompt'\] is bytes"),
    "dict of text for ids": ({"prompt_token_ids": "a"}, r"^prompts\['prompt_token_ids'\] is str 'a': token ids"),
    "dict of several": ({"prompt_token_ids": [[1], [2]]}, r"^prompts\['prompt_token_ids'\] has 2 rows, where one"),
    "dict in dict": ({"prompt_token_ids": {"prompt_token_ids": [1]}}, "token ids are expected"),
    "dict of a wrong salt": ({"prompt": "a", "cache_salt": 1}, r"\['cache_salt'\] is int 1: text is expected"),
    "tokenizer of texts": ({"input_ids": ["a"]}, r"\['input_ids'\] is list \['a'\]: token ids are expected"),
    "mask of another shape": ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask of another shape"),
    "object": (object(), "object"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_anything_else_is_refused_in_a_sentence(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        read_prompts(given)
    assert caught.value.param == "prompt"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_an_error_is_short_whatever_was_given() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    itself: list[Any] = []
    itself.append(itself)
    for given in (deep, itself, [[list(range(10**6))]], [["x" * 10**6]], {"prompt": ["y"] * 10**6}):
        with pytest.raises(RequestError) as caught:
            read_prompts(given)
        assert len(str(caught.value)) < 300


def test_one_prompt_is_not_several() -> None:
    with pytest.raises(RequestError, match=r"^prompt is list \['a', 'b'\]: one prompt is expected here"):
        read_prompt(["a", "b"])
    with pytest.raises(RequestError, match=r"^prompt has 2 rows, where one prompt is expected$"):
        read_prompt(np.ones((2, 3), int))


# --- conversations ---

HELLO = {"role": "user", "content": "hello"}


@pytest.mark.parametrize("given", [[HELLO], (HELLO,), [UserDict(HELLO)]])
def test_one_conversation_is_taken(given: Any) -> None:
    assert read_messages(given) == [HELLO]
    assert read_conversations(given) == [[HELLO]]


def test_several_conversations_are_taken() -> None:
    assert read_conversations([[HELLO], (HELLO, HELLO)]) == [[HELLO], [HELLO, HELLO]]
    assert read_conversations([]) == []


def test_a_call_without_content_and_parts_are_taken() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": []}
    assert read_messages([call, {"role": "user", "content": ({"type": "text", "text": "a"},)}]) == [
        call, {"role": "user", "content": [{"type": "text", "text": "a"}]}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("hello", r"^messages is str 'hello', not a list of messages\. Write \[\{"),
        (HELLO, r"^messages is dict .*, not a list of messages\. Write"),
        (None, r"^messages is None, not a list of messages$"),
        (7, "^messages is int 7"),
        (b"a", "^messages is bytes"),
        ([HELLO, "a"], r"^messages\[1\] is str 'a', not a dict with 'role' and 'content'$"),
        (["a"], r"^messages\[0\] is str 'a', not a list of messages"),
        ([[HELLO], "a"], r"^messages\[1\] is str 'a', not a list"),
        ([[]], r"^messages\[0\] is empty: a conversation has at least one message$"),
        ([[[HELLO]]], r"^messages\[0\]\[0\] is list .*, not a dict"),
        ([{"content": "a"}], r"^messages\[0\] has 'content': a message's 'role' is text, such as 'user'$"),
        ([{"role": 1, "content": "a"}], r"^messages\[0\] has role int 1"),
        ([{"role": "user", "content": 7}], r"^messages\[0\] has content int 7, not text or a list of parts$"),
        ([{"role": "user", "content": b"a"}], r"has content bytes"),
        ([{"role": "user", "content": {"text": "a"}}], r"has content dict"),
    ],
)
def test_wrong_conversations_are_refused_in_a_sentence(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        read_conversations(given)
    assert caught.value.param == "messages"


# --- parameters ---


def test_parameters_are_for_all_or_for_each() -> None:
    one, other = SamplingParams(max_tokens=1), SamplingParams(max_tokens=2)
    assert read_params(None, 2) == [SamplingParams()] * 2
    assert read_params(one, 2) == [one, one]
    assert read_params((p for p in (one, other)), 2) == [one, other]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([SamplingParams()], "^2 prompts came with 1 sets of parameters$"),
        ([], "^2 prompts came with 0 sets of parameters$"),
        ([SamplingParams(), None], r"^params\[1\] is None, not SamplingParams$"),
        ([{"max_tokens": 1}] * 2, r"^params\[0\] is dict .*, not SamplingParams$"),
        ({"max_tokens": 1}, r"^params is dict .*, not SamplingParams or a list of them$"),
        ("greedy", "^params is str 'greedy'"),
        (5, "^params is int 5"),
        (SamplingParams, "^params is StructMeta"),
    ],
)
def test_wrong_parameters_are_refused_in_a_sentence(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_params(given, 2)
