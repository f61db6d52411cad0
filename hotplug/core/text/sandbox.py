"""The Jinja sandbox of chat templates: what a checkpoint brings may neither reach the program nor take its memory.

Jinja's own sandbox keeps a template from attributes and bounds `range`. Here every operation that can make much of
little (repeating, padding, formatting, replacing, joining) is bounded before it is computed, as is what is rendered.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.nodes
import jinja2.sandbox
from jinja2.runtime import Context

MOST_CHARS = 1 << 25
"""Characters that a template may write, and of any text that it makes."""
MOST_NUMBER = 1_000_000
"""The largest number that a template may hand to a function or filter: a width, a count."""
_MOST_BITS = 4096
"""Of an integer that a template computes."""
_NUMBER = re.compile(r"\d{1,9}")
"""May be the width of a field."""
_COMPUTED = re.compile(r"\{[^{}]*\{|%[^%a-zA-Z]*\*")
"""A field whose width is an argument."""


class TooLarge(jinja2.TemplateError):
    """A template makes more than the bounds above."""


class _Generator(jinja2.compiler.CodeGenerator):
    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:  # noqa: N802  (Jinja's)
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Compiles templates that stay within the bounds. They raise TooLarge."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals.pop("lipsum", None)  # words by the million
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check = {"*": _check_product, "**": _check_power, "%": _check_format, "+": _check_sum}[operator]
        check(left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  (as Jinja has it)
        _check_numbers((*args, *kwargs.values()))
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja's sandbox wraps `format`
        own = getattr(method, "__self__", None)
        if isinstance(own, str):
            _check_method(getattr(method, "__name__", ""), own, (*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def concatenated(self, parts: tuple[Any, ...]) -> str:
        """The operator `~`."""
        texts = [str(part) for part in parts]
        _check_chars(sum(map(len, texts)))
        return "".join(texts)

    def rendered(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """What a template writes."""
        return "".join(_counted(template.generate(variables)))


def _counted(pieces: Iterator[str]) -> Iterator[str]:
    total = 0
    for piece in pieces:
        total += len(piece)
        _check_chars(total)
        yield piece


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose numbers, and what it makes of a text, are bounded."""

    @functools.wraps(function)  # which keeps what Jinja is to pass to it
    def bounded(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if hasattr(function, "jinja_pass_arg") else args
        _check_numbers((*given, *kwargs.values()))
        if given and isinstance(given[0], str):
            _check_method(name, given[0], (*given[1:], *kwargs.values()))
        elif name == "join" and len(given) > 1 and isinstance(given[0], list | tuple):
            _check_method(name, str(given[1]), given[:1])
        return function(*args, **kwargs)

    return bounded


def _check_chars(count: int) -> None:
    if count > MOST_CHARS:
        raise TooLarge(f"it makes a text of more than {MOST_CHARS} characters")


def _check_numbers(values: tuple[Any, ...]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MOST_NUMBER:
            raise TooLarge(f"it calls a function with a number above {MOST_NUMBER}")


def _check_method(name: str, text: str, args: tuple[Any, ...]) -> None:
    """What a method or filter of `text` will make."""
    if name == "replace" and len(args) > 1 and all(isinstance(arg, str) for arg in args[:2]):
        _check_chars(len(text) + text.count(args[0]) * len(args[1]))
    elif name == "join" and args and isinstance(args[0], list | tuple):
        _check_chars(len(text) * len(args[0]) + sum(len(one) for one in args[0] if isinstance(one, str)))
    elif name in ("format", "format_map"):
        _check_format(text, args)


def _check_product(left: Any, right: Any) -> None:
    for many, count in ((left, right), (right, left)):
        if isinstance(many, str | list | tuple) and isinstance(count, int):
            _check_chars(len(many) * max(count, 0))
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MOST_BITS:
        raise TooLarge("it computes a number beyond all use")


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _MOST_BITS:
        raise TooLarge("it computes a number beyond all use")


def _check_format(text: Any, args: Any) -> None:
    """Bounds what `text` with its fields filled in may be, from above: each field may be the longest argument, and
    every number a width."""
    if not isinstance(text, str):
        return
    if _COMPUTED.search(text.replace("{{", "").replace("}}", "")):
        raise TooLarge("it formats to a width that it computes")
    widths = sum(map(int, _NUMBER.findall(text)))
    fields = text.count("{") + text.count("%")
    _check_chars(len(text) + widths + fields * len(str(args)))


def _check_sum(left: Any, right: Any) -> None:
    if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        _check_chars(len(left) + len(right))
