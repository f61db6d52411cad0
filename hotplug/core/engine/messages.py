"""Messages between front ends and the engine process: msgspec over ZeroMQ.

A message is one frame, but for `Add`: its prompts follow in frames of their own, raw int32, which neither side copies
where they are large. What a step gave travels as columns (`Outputs`), one message a step and client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import zmq

from hotplug.core.errors import PromptTooLongError, QueueFullError, RequestError
from hotplug.core.request import EngineStats, Request, TokenDelta
from hotplug.core.scheduler.plan import IntArray
from hotplug.core.scheduler.tokens import StepTokens, TagArray, token_array

# --- to the engine ---


class Add(msgspec.Struct, tag="add"):
    """Requests without their prompts; see `add_frames`."""

    requests: list[Request]
    prompts: list[int]
    """Which of the frames that follow is each request's prompt."""


class Abort(msgspec.Struct, tag="abort"):
    request_ids: list[str]


class Explain(msgspec.Struct, tag="explain"):
    """Ask for the bound plan."""

    client: int = 0


class ClientGone(msgspec.Struct, tag="client_gone"):
    """A front end has died: abort all its requests, and drop what is on the way to it."""

    client: int
    generation: int = 0
    """Which process of that number: the word of its death may come after that of its successor."""


class ClientBack(msgspec.Struct, tag="client_back"):
    """A front end that attaches says so, and gets `Ready`. What one of its number had before it is dropped."""

    client: int
    generation: int = 0


class Stop(msgspec.Struct, tag="stop"):
    """End the process once this message is read."""


ToEngine = Add | Abort | Explain | ClientGone | ClientBack | Stop

# --- to a front end ---


class Ready(msgspec.Struct, tag="ready"):
    """Weights are loaded and the KV cache is allocated."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Outputs(msgspec.Struct, tag="outputs"):
    """What one step gave to all requests of a front end, as `StepTokens`."""

    tags: bytes
    """[n] int64."""
    tokens: bytes
    """[n] int32."""
    deltas: list[TokenDelta]
    stats: EngineStats

    @classmethod
    def of(cls, gained: StepTokens, stats: EngineStats) -> Outputs:
        return cls(gained.tags.tobytes(), gained.tokens.tobytes(), gained.deltas, stats)

    def columns(self) -> tuple[TagArray, IntArray]:
        """Tags and tokens."""
        return np.frombuffer(self.tags, np.int64), np.frombuffer(self.tokens, np.int32)


class Refused(msgspec.Struct, tag="refused"):
    """A request that the engine did not take."""

    request_tag: int
    kind: Literal["request", "too_long", "queue_full"]
    message: str
    param: str | None = None
    retry_after: int = 1

    @classmethod
    def from_error(cls, request: Request, error: RequestError | QueueFullError) -> Refused:
        if isinstance(error, QueueFullError):
            return cls(request.tag, "queue_full", error.what, retry_after=error.retry_after)
        kind: Literal["request", "too_long"] = "too_long" if isinstance(error, PromptTooLongError) else "request"
        return cls(request.tag, kind, str(error), error.param)

    def to_error(self) -> RequestError | QueueFullError:
        """The error as the engine raised it."""
        if self.kind == "queue_full":
            return QueueFullError(self.message, retry_after=self.retry_after)
        return (PromptTooLongError if self.kind == "too_long" else RequestError)(self.message, param=self.param)


class Plan(msgspec.Struct, tag="plan"):
    report: dict[str, Any]


class Dropped(msgspec.Struct, tag="dropped"):
    """The front end did not take its messages: all requests that it had sent by then are aborted."""

    reason: str


class Failed(msgspec.Struct, tag="failed"):
    """The engine's last words: it could not start, or a step raised. A supervisor says them for one that had none."""

    message: str
    traceback: str
    deliberate: bool
    """Whether the message is worded for the user (a HotplugError) and the traceback adds nothing."""


FromEngine = Ready | Outputs | Refused | Plan | Dropped | Failed

encode = msgspec.msgpack.Encoder().encode
_decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def add_frames(requests: Sequence[Request]) -> list[Any]:
    """The frames of an `Add`. Requests that share a prompt, one object, send it once."""
    frames: list[Any] = [b""]
    prompts: list[int] = []
    bare: list[Request] = []
    last: Any = None
    for request in requests:
        if request.prompt_token_ids is not last:
            last = request.prompt_token_ids
            frames.append(token_array(last))
        prompts.append(len(frames) - 2)
        bare.append(msgspec.structs.replace(request, prompt_token_ids=()))
    frames[0] = encode(Add(bare, prompts))
    return frames


def decode_to_engine(frames: Sequence[zmq.Frame]) -> ToEngine:
    """A message as received; the prompts of an `Add` are views of its frames."""
    message = _decode_to_engine(frames[0].buffer)
    if isinstance(message, Add):
        arrays = [np.frombuffer(frame.buffer, np.int32) for frame in frames[1:]]
        for request, number in zip(message.requests, message.prompts, strict=True):
            msgspec.structs.force_setattr(request, "prompt_token_ids", arrays[number])
    return message
