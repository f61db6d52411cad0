"""Messages between a front end and the engine process: msgspec over ZeroMQ, one frame each."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from hotplug.core.errors import PromptTooLongError, QueueFullError, RequestError
from hotplug.core.request import EngineStats, Request, TokenDelta

# --- to the engine ---


class Add(msgspec.Struct, tag="add"):
    requests: list[Request]


class Abort(msgspec.Struct, tag="abort"):
    request_ids: list[str]


class Explain(msgspec.Struct, tag="explain"):
    """Ask for the bound plan."""


class Stop(msgspec.Struct, tag="stop"):
    """End the process once this message is read."""


ToEngine = Add | Abort | Explain | Stop

# --- to the front end ---


class Ready(msgspec.Struct, tag="ready"):
    """Weights are loaded and the KV cache is allocated."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Outputs(msgspec.Struct, tag="outputs"):
    """What one step gave, for all requests together."""

    deltas: list[TokenDelta]
    stats: EngineStats


class Refused(msgspec.Struct, tag="refused"):
    """A request that the engine did not take."""

    request_id: str
    kind: Literal["request", "too_long", "queue_full"]
    message: str
    param: str | None = None
    retry_after: int = 1

    @classmethod
    def from_error(cls, request_id: str, error: RequestError | QueueFullError) -> Refused:
        if isinstance(error, QueueFullError):
            return cls(request_id, "queue_full", error.what, retry_after=error.retry_after)
        kind: Literal["request", "too_long"] = "too_long" if isinstance(error, PromptTooLongError) else "request"
        return cls(request_id, kind, str(error), error.param)

    def to_error(self) -> RequestError | QueueFullError:
        """The error as the engine raised it."""
        if self.kind == "queue_full":
            return QueueFullError(self.message, retry_after=self.retry_after)
        return (PromptTooLongError if self.kind == "too_long" else RequestError)(self.message, param=self.param)


class Plan(msgspec.Struct, tag="plan"):
    report: dict[str, Any]


class Failed(msgspec.Struct, tag="failed"):
    """The engine's last words: it could not start, or a step raised."""

    message: str
    traceback: str
    deliberate: bool
    """Whether the message is worded for the user (a HotplugError) and the traceback adds nothing."""


FromEngine = Ready | Outputs | Refused | Plan | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
