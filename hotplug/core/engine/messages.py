"""Messages between front ends and the engine process: msgspec over ZeroMQ.

A message is one frame, but for `Add`: its prompts follow in frames of their own, raw int32, which neither side copies
where they are large. Each of its requests is encoded by itself, so that one which cannot be encoded, or decoded, is
refused and takes no other with it. What a step gave travels as columns (`Outputs`), one message a step and client.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import zmq

from hotplug.core.errors import HotplugError, PromptTooLongError, QueueFullError, RequestError
from hotplug.core.request import EngineStats, Request, SamplingParams, TokenDelta, changed
from hotplug.core.scheduler.plan import IntArray
from hotplug.core.scheduler.tokens import StepTokens, TagArray, token_array

# --- to the engine ---


class Add(msgspec.Struct, tag="add"):
    """Requests without their prompts; see `add_frames`, and `received` for the other side."""

    requests: list[msgspec.Raw]
    """Each a `Request`, encoded."""
    prompts: list[int]
    """Which of the frames that follow is each request's prompt."""
    tags: list[int]
    """Of each request: whom to tell, where a request cannot be decoded."""


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
    max_num_seqs: int = 1
    """Requests that run at once."""
    plan_hash: str = ""
    """Names the bound plan (`hotplug.core.ops.plan`)."""


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
    kind: Literal["request", "too_long", "queue_full", "failed"]
    message: str
    param: str | None = None
    retry_after: int = 1

    @classmethod
    def from_error(cls, tag: int, error: Exception) -> Refused:
        """Any error: what is none of the request's own (`RequestError`, `QueueFullError`) is a failure on our side."""
        if isinstance(error, QueueFullError):
            return cls(tag, "queue_full", error.what, retry_after=error.retry_after)
        if isinstance(error, RequestError):
            kind: Literal["request", "too_long"] = "too_long" if isinstance(error, PromptTooLongError) else "request"
            return cls(tag, kind, as_text(str(error)), None if error.param is None else as_text(error.param))
        return cls(tag, "failed", as_text(f"{type(error).__name__}: {error}"))

    def to_error(self) -> HotplugError:
        """The error as the engine raised it."""
        match self.kind:
            case "queue_full":
                return QueueFullError(self.message, retry_after=self.retry_after)
            case "failed":
                return HotplugError("the engine could not take the request", why=self.message)
            case "too_long":
                return PromptTooLongError(self.message, param=self.param)
            case "request":
                return RequestError(self.message, param=self.param)


class PlanReport(msgspec.Struct, tag="plan"):
    """The answer to a question for the kernel plan."""

    report: dict[str, Any]
    error: str = ""
    """Why there is no report, where there is none."""


class Dropped(msgspec.Struct, tag="dropped"):
    """The front end did not take its messages: all requests that it had sent by then are aborted."""

    reason: str


class Failed(msgspec.Struct, tag="failed"):
    """The engine's last words: it could not start, or a step raised. A supervisor says them for one that had none."""

    message: str
    traceback: str
    deliberate: bool
    """Whether the message is worded for the user (a HotplugError) and the traceback adds nothing."""


FromEngine = Ready | Outputs | Refused | PlanReport | Dropped | Failed

encode = msgspec.msgpack.Encoder().encode
_decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


class _CheckedSampling(SamplingParams, frozen=True, kw_only=True, omit_defaults=True):
    """What a front end has checked: types are checked again in decoding, ranges are not."""

    def __post_init__(self) -> None:
        pass


class _CheckedRequest(Request, frozen=True, kw_only=True, omit_defaults=True):
    """As `_CheckedSampling`."""

    sampling: _CheckedSampling

    def __post_init__(self) -> None:
        pass


_decode_request = msgspec.msgpack.Decoder(_CheckedRequest).decode


def as_text(message: str) -> str:
    """A message that can be sent: other people's errors may quote halves of surrogate pairs."""
    return message.encode("utf-8", "backslashreplace").decode()


def encode_outputs(gained: StepTokens, stats: EngineStats) -> bytes:
    """`Outputs`, encoded. What cannot be sent of one request becomes an error of that request alone."""
    try:
        return encode(Outputs.of(gained, stats))
    except Exception:
        deltas = [_sendable(delta) for delta in gained.deltas]
        return encode(Outputs.of(StepTokens(gained.tags, gained.tokens, gained.ids, deltas), stats))


def _sendable(delta: TokenDelta) -> TokenDelta:
    try:
        encode(delta)
    except Exception as e:
        error = as_text(f"what the engine found cannot be sent: {type(e).__name__}: {e}")
        return TokenDelta("", [], "error", error=error, tag=delta.tag)
    return delta


def add_frames(requests: Sequence[Request]) -> tuple[list[Any], list[tuple[Request, Exception]]]:
    """The frames of an `Add`, and the requests that cannot be encoded, which are not in it. Requests that share a
    prompt, one object, send it once; stop strings are not the engine's and stay here."""
    frames: list[Any] = [b""]
    add = Add([], [], [])
    failed: list[tuple[Request, Exception]] = []
    last: Any = None
    for request in requests:
        try:
            if request.prompt_token_ids is not last:
                array = token_array(request.prompt_token_ids)
                frames.append(array)
                last = request.prompt_token_ids
            raw = msgspec.Raw(encode(_bare(request)))
        except Exception as e:
            failed.append((request, e))
            continue
        add.requests.append(raw)
        add.prompts.append(len(frames) - 2)
        add.tags.append(request.tag)
    frames[0] = encode(add)
    return frames, failed


def _bare(request: Request) -> Request:
    """Without prompt and stop strings."""
    if not request.sampling.stop:
        return changed(request, prompt_token_ids=())
    return changed(request, prompt_token_ids=(), sampling=changed(request.sampling, stop=()))


def decode_to_engine(frames: Sequence[zmq.Frame]) -> ToEngine:
    """A message as received. Raises msgspec.DecodeError for what is none. For an `Add`, see `received`."""
    message: ToEngine = _decode_to_engine(frames[0].buffer)
    return message


def received(add: Add, frames: Sequence[zmq.Frame]) -> Iterator[tuple[int, Request | Exception]]:
    """Tag and request of each in an `Add` that came in `frames`, the prompt a view of its frame; or why it is none."""
    for tag, raw, number in zip(add.tags, add.requests, add.prompts, strict=True):
        try:
            request = _decode_request(raw)
            prompt = np.frombuffer(frames[1 + number].buffer, np.int32)
            msgspec.structs.force_setattr(request, "prompt_token_ids", prompt)
        except Exception as e:
            yield tag, e
        else:
            yield tag, request
