"""Flags generated from configuration dataclasses, so that an option is written down once.

A command declares the configurations it takes; the flags, their help, the TOML file and the precedence
(flag over file over default) come from here. What the options mean is the dataclasses' business.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A folder or file, hf:org/name, pypi:distribution, or an alias."),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE.toml", help="Options from a file: tables [engine] and [server].",
                 rich_help_panel="Configuration"),
]  # fmt: skip
_POSITIONAL = "model"


class SectionedCommand(TyperCommand):
    """A command whose plain help has a section for each panel of options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                title = getattr(parameter, "rich_help_panel", None) or kind
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def takes(**configs: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of configuration classes; it is called with checked instances of them.

    `@takes(engine=EngineConfig)` over `def explain(engine, *, json)` adds the MODEL argument, `--config` and
    a flag for each field of EngineConfig; `json` stays the command's own option. A bad value raises
    ConfigError.
    """
    flags = {name: _flags(cls, panel=f"{name.capitalize()} options") for name, cls in configs.items()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name not in configs]

        def run(*, model: str | None, config: Path | None, **given: Any) -> None:
            if model is not None:
                given[_POSITIONAL] = model
            built = {name: _build(cls, given, config) for name, cls in configs.items()}
            command(**built, **{p.name: given[p.name] for p in own})

        arguments = [p for p in own if _is_argument(p)]
        options = [p for p in own if not _is_argument(p)]
        parameters = [_parameter(_POSITIONAL, ModelArgument), *arguments, *options, _parameter("config", ConfigFile)]
        for generated in flags.values():
            parameters += generated
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {}
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        )
        return run

    return decorate


def _is_argument(parameter: inspect.Parameter) -> bool:
    metadata = getattr(parameter.annotation, "__metadata__", ())
    return any(isinstance(m, typer.models.ArgumentInfo) for m in metadata)


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _build(cls: type, given: Mapping[str, Any], file: Path | None) -> Any:
    """A configuration from the flags that were given, over the file, over the defaults."""
    values = {
        f.name: tuple(given[f.name]) if isinstance(given[f.name], list) else given[f.name]
        for f in dataclasses.fields(cls)
        if given.get(f.name) not in (None, [], ())
    }
    return cls(**values) if file is None else cls.from_file(file, **values)  # type: ignore[attr-defined]


def _flags(cls: type, *, panel: str) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(cls)
    return [
        _parameter(f.name, _annotation(f, hints[f.name], panel))
        for f in dataclasses.fields(cls)
        if f.name != _POSITIONAL
    ]


def _annotation(f: dataclasses.Field[Any], hint: Any, panel: str) -> Any:
    """The typer option of a field. Its own default is None, "not given", so that the file can speak."""
    kinds = [k for k in _alternatives(hint) if k is not types.NoneType]
    flag = "--" + f.name.replace("_", "-")
    shown = f.metadata["doc"] + _default_text(f.default)
    common = {"help": shown, "rich_help_panel": panel, "show_default": False}
    if kinds == [bool]:
        return Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", **common)]
    if typing.get_origin(kinds[0]) is tuple:
        return Annotated[list[str] | None, typer.Option(flag, metavar="TEXT", **common)]
    if kinds in ([int], [float]):
        low, high = f.metadata["low"], f.metadata["high"]
        return Annotated[kinds[0] | None, typer.Option(flag, min=low, max=high, **common)]
    if typing.get_origin(kinds[0]) is typing.Literal:
        choices = "|".join(map(str, typing.get_args(kinds[0])))
        return Annotated[str | None, typer.Option(flag, metavar=f"[{choices}]", **common)]
    metavar = "SIZE" if kinds == [str, int] else "TEXT"
    return Annotated[str | None, typer.Option(flag, metavar=metavar, **common)]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _default_text(default: Any) -> str:
    if default is None or default == ():
        return ""
    shown = {True: "on", False: "off"}.get(default, default) if isinstance(default, bool) else default
    return f" (default: {shown})"
