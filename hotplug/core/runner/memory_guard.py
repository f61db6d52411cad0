"""What a device that runs out of memory says to the user: what was asked, what was free, which option lowers it."""

from __future__ import annotations

import re
from types import TracebackType

import torch

from hotplug.core.errors import OutOfMemoryError
from hotplug.core.platform.select import Selection

WEIGHTS = "Take a smaller or quantized model or a narrower --dtype, or end other programs that use the device."
ROWS = "Lower --max-model-len or --max-num-seqs: each sequence has room for the longest."
SAMPLER = "Lower --max-num-seqs: the sampler keeps counts of the whole vocabulary for each."
PROFILE = "Lower --max-num-batched-tokens or --max-num-seqs: the largest step that they allow was tried."
KV_CACHE = "Lower --memory-utilization; another program may have taken memory meanwhile."
KV_CACHE_CAPPED = "Lower --kv-cache-memory."
EXECUTABLES = "Lower --memory-utilization or --kv-cache-memory, so that more stays free, or --max-num-seqs."
STEP = ("Lower --memory-utilization or --kv-cache-memory, so that more stays free for steps, or make steps smaller "
        "with --max-num-batched-tokens, --max-num-seqs or --max-model-len.")  # fmt: skip


class MemoryGuard:
    """Within it, an allocation that fails raises OutOfMemoryError. Holds no state: may be entered again and again."""

    __slots__ = ("_asked", "_doing", "_hint", "_selection")

    def __init__(self, doing: str, selection: Selection, hint: str, *, asked: int | None = None) -> None:
        """`doing` completes "out of memory while ..."; `asked` is the size in bytes where it is known."""
        self._doing, self._selection, self._hint, self._asked = doing, selection, hint, asked

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and ran_out(error):
            raise self._explained(error) from error

    def _explained(self, error: BaseException) -> OutOfMemoryError:
        platform, device = self._selection.platform, self._selection.device
        memory = platform.memory(device)
        asked = _size(self._asked) if self._asked is not None else _asked(str(error))
        free = f"{_size(memory.free)} of {_size(memory.total)} are free"
        return OutOfMemoryError(
            f"out of memory while {self._doing}",
            where=f"{platform.name}:{device.index}",
            why=f"{asked} were asked for, {free}" if asked else free,
            hint=self._hint,
        )


def step_guard(selection: Selection) -> MemoryGuard:
    """What a rank enters to run a step."""
    return MemoryGuard("running a step", selection, STEP)


def ran_out(error: BaseException) -> bool:
    """Whether an error of torch, of NumPy, or of a library below it, is an allocation that failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def _asked(text: str) -> str:
    """The size in an allocator's message, empty if it names none."""
    found = re.search(r"[Tt]ried to allocate (\d[\d.]*) ?(\w+)", text)
    if found is None:
        return ""
    return _size(int(found[1])) if found[2] == "bytes" and found[1].isdecimal() else f"{found[1]} {found[2]}"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
