"""What callers give as prompts, conversations and parameters: each form read once, here, and anything else refused.

A prompt is one of
- text,
- token ids: a list or tuple of integers, a one-dimensional array or tensor of integers,
- what a tokenizer returns: a mapping with `input_ids`, whose padding is left out, or an `Encoding` of `tokenizers`,
- a mapping with `prompt` (text) or `prompt_token_ids`, and `cache_salt` if the prefix cache is to be kept apart.

Several are any iterable of those that has an order, forms mixed as they come, or one array or mapping of several rows.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np

from hotplug.core import checks
from hotplug.core.errors import RequestError
from hotplug.core.request import SamplingParams

OnePrompt = str | Sequence[int] | Mapping[str, Any] | Any
"""Text, token ids, an array, a tokenizer's output, or a dict: what the functions below read and check."""
_TAKEN = "text, token ids, a tokenizer's output, or a dict with 'prompt' or 'prompt_token_ids'"
_TEXT = checks.text(checks.INT64)
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxtuple, _BRIEF.maxset, _BRIEF.maxdict = 2, 3, 3, 3, 3


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its text, its token ids, or both."""

    text: str | None = None
    token_ids: list[int] | None = None
    """Where both are given, these count."""
    cache_salt: str = ""

    def encoded(self, encode: Callable[[str], list[int]]) -> list[int]:
        """Its token ids."""
        return encode(self.text or "") if self.token_ids is None else self.token_ids


def read_prompts(given: Any, where: str = "prompts") -> list[Prompt]:
    """The prompts that a caller gave: one, or several. Raises RequestError(param="prompt")."""
    prompts = _one_or_rows(given, where)
    if prompts is not None:
        return prompts
    items = _items(given, where)
    if items and _is_number(items[0]):
        return [Prompt(token_ids=_integers(items, where))]
    return [read_prompt(item, f"{where}[{i}]") for i, item in enumerate(items)]


def read_prompt(given: Any, where: str = "prompt") -> Prompt:
    """One prompt. Raises RequestError(param="prompt")."""
    if type(given) is list and given and type(given[0]) is int:  # what a server gives
        return Prompt(token_ids=_integers(given, where))
    prompts = _one_or_rows(given, where)
    if prompts is None:
        items = _items(given, where)
        if items and not _is_number(items[0]):
            raise _refused(where, given, "one prompt is expected here, and this holds others")
        return Prompt(token_ids=_integers(items, where))
    if len(prompts) != 1:
        raise RequestError(f"{where} has {len(prompts)} rows, where one prompt is expected", param="prompt")
    return prompts[0]


def _one_or_rows(given: Any, where: str) -> list[Prompt] | None:
    """The prompts in text, a mapping, an encoding or an array of integers; None for anything else."""
    if isinstance(given, str):
        return [Prompt(text=_TEXT("prompt", given))]
    if isinstance(given, Mapping):
        return _of_tokenizer(given, where) if given.get("input_ids") is not None else [_of_mapping(given, where)]
    if isinstance(ids := getattr(given, "ids", None), list):  # `tokenizers.Encoding`
        return [Prompt(token_ids=_integers(ids, f"{where}.ids"))]
    if _is_array(given):
        array = _array(given, where)
        if array.ndim in (1, 2) and (array.dtype.kind in "iu" or not array.size):
            return [Prompt(token_ids=row.tolist()) for row in np.atleast_2d(array)]
        if array.ndim != 1 or array.dtype.kind not in "OU":  # which hold texts, or rows of several lengths
            raise RequestError(f"{where} is an array of {array.dtype} of shape {list(array.shape)}: token ids are "
                               "integers in one dimension, or in two for several prompts", param="prompt")  # fmt: skip
    return None


def _items(given: Any, where: str) -> list[Any]:
    """What an iterable that has an order holds."""
    if isinstance(given, bytes | bytearray | memoryview | Set) or not isinstance(given, Iterable):
        raise _refused(where, given)
    return list(given)


def _of_mapping(given: Mapping[Any, Any], where: str) -> Prompt:
    values = {key: value for key, value in given.items() if value is not None}
    if not values.keys() & {"prompt", "prompt_token_ids"}:
        hint = "Give messages to `chat`." if "role" in values else ""
        raise RequestError(f"{where} is a {type(given).__name__} with {_keys(given)}, not with 'prompt', "
                           "'prompt_token_ids' or 'input_ids'", param="prompt", hint=hint)  # fmt: skip
    text, ids, salt = values.pop("prompt", None), values.pop("prompt_token_ids", None), values.pop("cache_salt", "")
    if values:
        raise RequestError(f"{where} has {_shown(next(iter(values)))}, which is not supported", param="prompt")
    for key, value in (("prompt", text), ("cache_salt", salt)):
        if value is not None and not isinstance(value, str):
            raise _refused(f"{where}[{key!r}]", value, "text is expected")
    if ids is not None:
        (ids,) = _rows(ids, f"{where}['prompt_token_ids']", most=1)
    return Prompt(None if text is None else _TEXT("prompt", text), ids, salt)


def _of_tokenizer(given: Mapping[Any, Any], where: str) -> list[Prompt]:
    """Rows of a tokenizer's output, without their padding."""
    rows = _rows(given["input_ids"], f"{where}['input_ids']")
    mask = given.get("attention_mask")
    if mask is not None:
        seen = _rows(mask, f"{where}['attention_mask']")
        if [len(row) for row in seen] != [len(row) for row in rows]:
            raise RequestError(f"{where} has an attention_mask of another shape than its input_ids", param="prompt")
        rows = [list(compress(row, kept)) for row, kept in zip(rows, seen, strict=True)]
    return [Prompt(token_ids=row) for row in rows]


def _rows(given: Any, where: str, most: int | None = None) -> list[list[int]]:
    """Token ids of one prompt, or of several, at `most` so many."""
    if isinstance(given, str | Mapping):
        raise _refused(where, given, "token ids are expected")
    if isinstance(given, Sequence) and not given:
        return [[]]
    prompts = read_prompts(given, where)
    if most is not None and len(prompts) > most:
        raise RequestError(f"{where} has {len(prompts)} rows, where one prompt is expected", param="prompt")
    rows = [prompt.token_ids for prompt in prompts]
    if not rows or any(row is None for row in rows):
        raise _refused(where, given, "token ids are expected")
    return [row for row in rows if row is not None]


def _integers(given: Sequence[Any], where: str) -> list[int]:
    """A list of integers, of a sequence that is to hold nothing else."""
    if set(map(type, given)) <= {int}:
        return given if type(given) is list else list(given)
    return [_integer(one, f"{where}[{i}]") for i, one in enumerate(given)]


def _integer(given: Any, where: str) -> int:
    boolean = isinstance(given, bool) or str(getattr(given, "dtype", "")).endswith("bool")
    if _is_number(given) and not boolean:
        try:
            return operator.index(given)
        except Exception:  # a float; a number of other people's
            pass
    raise _refused(where, given, "token ids are integers")


def _is_number(given: Any) -> bool:
    """Whether a sequence that begins with this is meant as token ids."""
    if isinstance(given, str | bytes):
        return False  # NumPy's are arrays, too
    if _is_array(given):
        return len(given.shape) == 0
    return isinstance(given, int | float | complex) or hasattr(given, "__index__")


def _is_array(given: Any) -> bool:
    """Whether this is NumPy's, PyTorch's or another library's array."""
    return hasattr(given, "__array__") and hasattr(given, "shape") and hasattr(given, "dtype")


def _array(given: Any, where: str) -> np.ndarray[Any, Any]:
    detach = getattr(given, "detach", None)  # a tensor, which may be on a device
    try:
        return np.asarray(detach().cpu() if callable(detach) else given)
    except Exception as e:  # sparse, nested, without values, of a type that NumPy has not
        raise RequestError(f"{where} is a {type(given).__name__} that gives no array", param="prompt",
                           hint="Give token ids as integers.") from e  # fmt: skip


# --- conversations --------------------------------------------------------------------------------


def read_conversations(given: Any) -> list[list[dict[str, Any]]]:
    """The conversations that a caller gave: one list of messages, or several. Raises RequestError(param="messages")."""
    if not isinstance(given, list | tuple):
        raise _no_messages("messages", given)
    if not given:
        return []
    if any(isinstance(one, Mapping) for one in given):
        return [read_messages(given)]
    return [read_messages(one, f"messages[{i}]") for i, one in enumerate(given)]


def read_messages(given: Any, where: str = "messages") -> list[dict[str, Any]]:
    """One conversation. Raises RequestError(param="messages")."""
    if not isinstance(given, list | tuple):
        raise _no_messages(where, given)
    if not given:
        raise RequestError(f"{where} is empty: a conversation has at least one message", param="messages")
    return [_message(one, f"{where}[{i}]") for i, one in enumerate(given)]


def _message(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise RequestError(f"{where} is {_shown(given)}, not a dict with 'role' and 'content'", param="messages")
    message = dict(given)
    if not isinstance(message.get("role"), str):
        have = f"role {_shown(message['role'])}" if "role" in message else _keys(message)
        raise RequestError(f"{where} has {have}: a message's 'role' is text, such as 'user'", param="messages")
    content = message.get("content")
    if content is not None and not isinstance(content, str | list | tuple):
        raise RequestError(f"{where} has content {_shown(content)}, not text or a list of parts", param="messages")
    if isinstance(content, tuple):
        message["content"] = list(content)
    for text in (message["role"], content, *(content if isinstance(content, list | tuple) else ())):
        found = text.get("text") if isinstance(text, Mapping) else text
        if isinstance(found, str):
            _TEXT("messages", found)
    return message


def _no_messages(where: str, given: Any) -> RequestError:
    hint = 'Write [{"role": "user", "content": ...}].' if isinstance(given, str | Mapping) else ""
    return RequestError(f"{where} is {_shown(given)}, not a list of messages", param="messages", hint=hint)


# --- parameters -----------------------------------------------------------------------------------


def read_params(given: Any, count: int) -> list[SamplingParams]:
    """Parameters for `count` prompts: one for all, one each, or None. Raises RequestError(param="params")."""
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    if isinstance(given, str | bytes | Mapping | Set) or not isinstance(given, Iterable):
        raise RequestError(f"params is {_shown(given)}, not SamplingParams or a list of them", param="params")
    each = list(given)
    for i, one in enumerate(each):
        if not isinstance(one, SamplingParams):
            raise RequestError(f"params[{i}] is {_shown(one)}, not SamplingParams", param="params")
    if len(each) != count:
        raise RequestError(f"{count} prompts came with {len(each)} sets of parameters", param="params")
    return each


# --- errors ---------------------------------------------------------------------------------------


def _refused(where: str, given: Any, why: str = "") -> RequestError:
    hint = "Decode bytes to text first." if isinstance(given, bytes | bytearray | memoryview) else ""
    return RequestError(f"{where} is {_shown(given)}: {why or f'a prompt is {_TAKEN}'}", param="prompt", hint=hint)


def _shown(given: Any) -> str:
    """A value in a few words."""
    return "None" if given is None else f"{type(given).__name__} {_BRIEF.repr(given)}"


def _keys(given: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, list(given)[:5])) if given else "no keys"
