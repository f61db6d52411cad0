"""Tool calls and reasoning in a model's text: nothing is lost, nothing breaks, however the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotplug.core.text.json_scan import ObjectScanner
from hotplug.core.text.parsers import HermesParser, ThinkParser, ToolCall, parse_call, read_arguments
from hotplug.server.parsing import ChoiceParser, render_call

OPEN, CLOSE = HermesParser.tags
CUTS = st.lists(st.integers(0, 400), max_size=12)


def cut(text: str, cuts: list[int]) -> list[str]:
    places = sorted({c % (len(text) + 1) for c in cuts})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def read(parts: list[str], *, prompt_end: str = "") -> tuple[str, str, list[ToolCall]]:
    """Reasoning, content and calls of an answer that comes in these parts."""
    parser = ChoiceParser(ThinkParser(prompt_end), HermesParser())
    found = [*map(parser.push, parts), parser.finish()]
    return "".join(f.reasoning for f in found), "".join(f.content for f in found), [c for f in found for c in f.calls]


def calls(text: str) -> tuple[str, list[ToolCall]]:
    _, content, found = read([text])
    return content, found


# --- JSON -----------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet='ab"\\/\n\t{}[]:,é😀', max_size=6) | st.just(CLOSE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(value=st.dictionaries(st.text(max_size=4), JSON, max_size=4), ascii_=st.booleans(), cuts=CUTS)
def test_scanner_ends_where_the_object_does_and_keeps_its_values(value: Any, ascii_: bool, cuts: list[int]) -> None:
    text = json.dumps(value, ensure_ascii=ascii_, indent=1)
    scanner, read_ = ObjectScanner(), 0
    for part in cut(text + " }{", cuts):
        read_ += scanner.feed(part)
    assert (scanner.closed, read_) == (True, len(text))
    assert {key: json.loads(one) for key, one in scanner.members()} == value


@settings(max_examples=500, deadline=None)
@given(text=st.text(alphabet='{}[]",:\\u0d1-.eEntrufalsN \n', max_size=25).map("{".__add__), cuts=CUTS)
def test_scanner_takes_what_json_is_and_nothing_else(text: str, cuts: list[int]) -> None:
    try:
        _, end = json.JSONDecoder(strict=False).raw_decode(text)
    except ValueError:
        end = None
    scanner, read_ = ObjectScanner(), 0
    for part in cut(text, cuts):
        read_ += scanner.feed(part)
    assert (read_ if scanner.closed else None) == end


def test_depth_is_no_matter_and_time_is_linear() -> None:
    deep = f'{{"name": "f", "arguments": {"[" * 100_000}{"]" * 100_000}}}'
    content, (call,) = calls(OPEN + deep + CLOSE)
    assert (content, call.name, len(call.arguments)) == ("", "f", 200_000)
    unclosed = OPEN + '{"name": "f", "arguments": ' + "[" * 10_000
    assert calls(unclosed) == (unclosed, [])


# --- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("null", "{}"),
        ('""', "{}"),
        ('" "', "{}"),
        ('"null"', "{}"),
        ('{"x": 1e400}', '{"x": 1e400}'),
        ('{"x": NaN, "y": [-Infinity, Infinity]}', '{"x": "NaN", "y": ["-Infinity", "Infinity"]}'),
        ('{"x": "\\ud83d"}', '{"x": "\\ud83d"}'),
        ('"{\\"x\\": \\"\\ud83d\\"}"', '{"x": "\\ud83d"}'),
        ('{"x": "two\nlines"}', '{"x": "two\\u000alines"}'),
        ('{"x": ' + "9" * 5000 + "}", '{"x": ' + "9" * 5000 + "}"),
        ('"{\\"a\\": 1}"', '{"a": 1}'),
        ('"{\\"a\\": NaN}"', '{"a": "NaN"}'),
        ('"Oslo"', '"Oslo"'),
        ('"1, 2"', '"1, 2"'),
        ('"1, \\"value\\": 2"', '"1, \\"value\\": 2"'),
        ("[1, 2]", "[1, 2]"),
        ('{"a": 1, "a": 2}', '{"a": 1, "a": 2}'),
        ("{}", "{}"),
    ],
)
def test_arguments_are_kept_as_written_and_are_always_json(arguments: str, expected: str) -> None:
    call = parse_call(f'{{"name": "f", "arguments": {arguments}}}')
    assert call == ToolCall("f", expected)
    rendered = render_call(call)
    rendered["function"]["arguments"].encode()
    assert isinstance(json.loads(expected, parse_int=str), dict | list | str)


def test_missing_arguments_are_none_and_parameters_stand_for_them() -> None:
    assert parse_call('{"name": "f"}') == ToolCall("f", "{}")
    assert parse_call('{"name": "f", "parameters": {"a": 1}}') == ToolCall("f", '{"a": 1}')
    assert parse_call('{"name": "f", "arguments": null, "parameters": {"a": 1}}') == ToolCall("f", '{"a": 1}')


@pytest.mark.parametrize(
    "body",
    ['{"name": 1}', '{"name": ""}', '{"name": "\\ud83d"}', '{"arguments": {}}', "[]", '"f"', "{", "{]", "",
     "{'name': 'f'}", '{"name": "f", "arguments": 01}', '{"name": "f"} {"name": "g"}', '{"name": "f\\x"}'],
)  # fmt: skip
def test_what_is_no_call_stays_text(body: str) -> None:
    text = f"a {OPEN}{body}{CLOSE} b"
    assert calls(text) == (text, [])
    assert calls(text[:-2]) == (text[:-2], [])


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (OPEN + '{"name": "f", "arguments": {"x": "</tool_call>"}}' + CLOSE, "", "f"),
        (OPEN + '{"name": "f", "arguments": {"x": "<tool_call>{"}}' + CLOSE, "", "f"),
        (OPEN + '\n{"name": "f"}\n', "", "f"),
        (OPEN + '{"name": "f"}\n</tool_c', "", "f"),
        (OPEN + '{"name": "f"}' + OPEN + '{"name": "g"}', "", "fg"),
        (OPEN + '{"name": "f"}' + CLOSE + "\n\n" + OPEN + '{"name": "g"}' + CLOSE + "\n", "", "fg"),
        ("a\n" + OPEN + '{"name": "f"}' + CLOSE + "\nb", "a\n\nb", "f"),
        ("\n" + OPEN + '{"name": "f"}' + CLOSE, "", "f"),
        (OPEN + '{"name": "f", "argum', OPEN + '{"name": "f", "argum', ""),
        (OPEN + '{"name": "f' + CLOSE + OPEN + '{"name": "g"}' + CLOSE, OPEN + '{"name": "f' + CLOSE, "g"),
        (OPEN + "or " + OPEN + '{"name": "g"}' + CLOSE, OPEN + "or ", "g"),
        ("<tool_call", "<tool_call", ""),
        (" \n ", " \n ", ""),
        ("", "", ""),
    ],
)
def test_calls_end_where_they_end(text: str, content: str, names: str) -> None:
    found_content, found = calls(text)
    assert (found_content, "".join(call.name for call in found)) == (content, names)


PART = st.sampled_from([
    "text", " ", "\n", "<", "<think>", "</think>", OPEN, CLOSE, '{"name": "f", "arguments": ', '{"x": "</tool_call>"}',
    "}", "null", "NaN", '"', "\\", '{"name": "g"}', OPEN + '{"name": "h"}' + CLOSE, "tool_call>", "<th",
])  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(text=st.lists(PART, max_size=14).map("".join), cuts=CUTS, opened=st.booleans())
def test_where_an_answer_is_cut_does_not_matter(text: str, cuts: list[int], opened: bool) -> None:
    end = "<think>\n" if opened else ""
    whole = read([text], prompt_end=end)
    assert read(cut(text, cuts), prompt_end=end) == whole
    assert read(list(text), prompt_end=end) == whole


PIECES = st.lists(
    st.one_of(
        st.sampled_from(["word", "<", "</tool_call>", "{}", OPEN, OPEN + "{", OPEN + '{"name": 1}' + CLOSE]),
        st.sampled_from(['{"name": "f"}', '{"name": "g", "arguments": {"x": "</tool_call>"}}']).map(json.loads),
    ),
    max_size=8,
)


@settings(max_examples=300, deadline=None)
@given(pieces=PIECES, reasoning=st.sampled_from([None, "", "why"]))
def test_reasoning_content_and_calls_account_for_the_whole_answer(pieces: list[Any], reasoning: str | None) -> None:
    text = "" if reasoning is None else f"<think>{reasoning}</think>"
    written = [p if isinstance(p, str) else OPEN + json.dumps(p) + CLOSE for p in pieces]
    found = read([text + "\n".join(written)])
    assert found[0] == (reasoning or "")
    assert found[1].split() == "\n".join(p for p in pieces if isinstance(p, str)).split()
    assert [call.name for call in found[2]] == [p["name"] for p in pieces if isinstance(p, dict)]


# --- reasoning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("The tag <think> opens it, </think> closes it.", "", "The tag <think> opens it, </think> closes it."),
        ("<think>a</think>b <think>c</think>", "a", "b <think>c</think>"),
        (" \n<think>\na</think>\n\nb", "a", "b"),
        ("<think>a</think>\n<think>b</think>c", "ab", "c"),
        ("  indented", "", "  indented"),
        ("<thi", "", "<thi"),
        ("<think>a</thi", "a</thi", ""),
        ("<think></think>", "", ""),
        ("\n", "", "\n"),
    ],
)
def test_reasoning_stands_before_the_answer(text: str, reasoning: str, content: str) -> None:
    assert read([text]) == (reasoning, content, [])
    assert read(list(text)) == (reasoning, content, [])


def test_text_after_the_answer_began_is_not_kept_back() -> None:
    parser = ThinkParser()
    assert parser.push("so <thi").content == "so <thi"


# --- history --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1.5}', {"a": 1.5}),
        ('{"a": 1e400}', {"a": "1e400"}),
        ('{"a": -1e400, "b": NaN}', {"a": "-1e400", "b": "NaN"}),
        ("not json", "not json"),
        ("null", {}),
        (" ", {}),
        ("[" * 100_000, "[" * 100_000),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_arguments_that_come_back_are_a_value_or_text(text: str, value: Any) -> None:
    assert read_arguments(text) == value
