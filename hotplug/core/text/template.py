"""Chat templates: rendering a checkpoint's Jinja template in a sandbox. Knows nothing of tokens.

The environment offers what Hugging Face's offers (the templates are written for it): `raise_exception`,
`strftime_now`, `tojson` without HTML escaping, loop controls, and the `generation` tag, which marks the
assistant's words for training and renders its body here.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from hotplug.core.errors import RequestError
from hotplug.core.text.json_scan import escape_lone_surrogates
from hotplug.core.text.sandbox import Sandbox

_FAILURES = (Exception,)
"""What a template that meets messages it was not written for ends in: it is code that we did not write."""


class _Generation(jinja2.ext.Extension):
    tags = {"generation"}  # noqa: RUF012  (Jinja's own contract)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    """The prompt of a conversation. Raises RequestError (`messages`, or `chat_template` if it is no template)."""
    compiled = compile_template(template)
    try:
        return _environment().rendered(compiled, {**variables, "messages": messages})
    except _FAILURES as e:
        raise RequestError(f"the chat template cannot render these messages: {e}", param="messages") from e


@lru_cache(maxsize=32)
def compile_template(template: str) -> jinja2.Template:
    """A compiled template. Raises RequestError(param="chat_template") for a syntax error."""
    try:
        return _environment().from_string(template)
    except (jinja2.TemplateError, RecursionError) as e:
        line = f" in line {e.lineno}" if isinstance(e, jinja2.TemplateSyntaxError) else ""
        raise RequestError(f"the chat template is not valid Jinja{line}: {e}", param="chat_template") from e


def looked_for(template: str) -> set[str]:
    """Texts that a template compares with, or hands to a function: what it may look for in messages and cut them at.

    Raises RequestError(param="chat_template").
    """
    compile_template(template)
    tree = _environment().parse(template)
    places = tree.find_all((jinja2.nodes.Compare, jinja2.nodes.Call))
    texts = (node.value for place in places for node in place.find_all(jinja2.nodes.Const))
    return {text for text in texts if isinstance(text, str) and text}


def plain_turns(template: str, variables: dict[str, Any]) -> str:
    """What a template writes for a conversation of plain words; "" if it has none without more."""
    turns = [{"role": role, "content": "word"} for role in ("system", "user", "assistant", "user")]
    for messages in (turns, turns[1:]):
        try:
            return render(template, messages, variables)
        except RequestError:
            continue
    return ""


@lru_cache(maxsize=128)
def mentions(template: str, name: str) -> bool:
    """Whether a template has a variable, a member or a text of that name. Raises RequestError if it is no template."""
    compile_template(template)
    nodes = _environment().parse(template).find_all((jinja2.nodes.Name, jinja2.nodes.Getattr, jinja2.nodes.Const))
    return any(name in (getattr(node, field, None) for field in ("name", "attr", "value")) for node in nodes)


@lru_cache(maxsize=1)
def _environment() -> Sandbox:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text if text.isascii() else escape_lone_surrogates(text)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
