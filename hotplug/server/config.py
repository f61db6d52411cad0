"""The options of the HTTP server, from keyword arguments or the `[server]` table of the TOML file.

What the engine does is `hotplug.core.config.EngineConfig`; nothing here changes an answer's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hotplug.core.config import check_fields, known_fields, option, parse_bytes, read_table
from hotplug.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """All options of one HTTP server, checked on construction. Raises ConfigError."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for every interface")
    port: int = option(8000, "TCP port; 0 takes a free one", low=0, high=65535)
    api_key: tuple[str, ...] = option((), "Key that clients must send as a bearer token; repeatable")
    frontends: int = option(
        1, "Processes for HTTP, templates and text; 1 is this one, it supervises more", low=1, high=64)  # fmt: skip
    max_body_size: str | int = option("32MiB", "Largest request body that is read")
    read_timeout: int = option(
        30, "Seconds that a client gets to send a request's headers, and that its body may pause", low=1)  # fmt: skip
    shutdown_grace: int = option(
        30, "Seconds that running requests get to finish after SIGINT or SIGTERM", low=0)  # fmt: skip
    tool_parser: str | None = option(None, "Take tool calls out of answers: hermes, or a plugin's parser")
    reasoning_parser: str | None = option(None, "Set reasoning apart from answers: think, or a plugin's parser")
    otlp_endpoint: str | None = option(
        None, "Send a span a request to this OpenTelemetry collector (OTLP over HTTP), e.g. http://localhost:4318; "
        "needs the extra otel")  # fmt: skip
    access_log: bool = option(False, "Log one line a request")

    def __post_init__(self) -> None:
        check_fields(self)
        if parse_bytes(self.max_body_size) < 1024:
            raise ConfigError(f"max_body_size must be at least 1 KiB, got {self.max_body_size!r}")
        if self.otlp_endpoint is not None and not _is_url(self.otlp_endpoint):
            raise ConfigError(f"otlp_endpoint must be a URL of http or https, got {self.otlp_endpoint!r}",
                              hint="Write the collector's address, e.g. http://localhost:4318.")  # fmt: skip
        if not all(key and key.isascii() and key.isprintable() for key in self.api_key):
            raise ConfigError("api_key must be non-empty printable ASCII")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, where: str = "configuration") -> ServerConfig:
        """A configuration from loose input; unknown keys are refused with the nearest valid name."""
        return cls(**known_fields(cls, values, where=where))

    @classmethod
    def from_file(cls, path: Path, **overrides: Any) -> ServerConfig:
        """A configuration from the `[server]` table of a TOML file; `overrides` win."""
        return cls.from_mapping({**read_table(path, "server"), **overrides}, where=str(path))


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)
