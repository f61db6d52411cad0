"""The native library as a file: where it is, whether it can serve here and if not why, and its functions.

It is a plain C library (`src/hotplug_cpu.h`), loaded with ctypes: one build serves every Python and every torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from ctypes import c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from hotplug.vendor import PlatformError

VERSION = 3
"""`HP_VERSION` of the header that this package is written against."""
PATH = Path(__file__).parent / "libhotplug_cpu.so"

_BUILD = "`python -m hotplug.platforms.cpu.native.build` makes it"

BASELINE = "portable"
"""The instruction set that every processor has."""

_CALLS = ("hp_linear", "hp_linear_silu_mul", "hp_linear_f32", "hp_attention", "hp_rope_kv_write")
"""What a step is made of: each takes its struct, packed (`call`)."""
_SIGNATURES = {
    "hp_instruction_sets": ((), c_char_p),
    "hp_instruction_set": ((), c_char_p),
    "hp_use_instruction_set": ((c_char_p,), c_int),
    "hp_threads": ((), c_int),
    "hp_set_threads": ((c_int,), c_int),
    "hp_packed_bytes": ((c_int, c_int64, c_int64), c_int64),
    "hp_pack": ((c_int, c_void_p, c_int64, c_int64, c_void_p), c_int),
    "hp_replay": ((c_void_p, c_int64, c_void_p), c_int),
    **dict.fromkeys(_CALLS, ((c_char_p,), c_int)),
}
_STATUS = {1: "it refuses the arguments", 2: "out of memory"}


@dataclass(frozen=True)
class Library:
    """The loaded library. `c` holds its functions, with their C signatures."""

    c: ctypes.CDLL

    @property
    def instruction_sets(self) -> list[str]:
        """Those that the build holds and the processor runs, best first."""
        return str(self.c.hp_instruction_sets().decode()).split()

    @property
    def instruction_set(self) -> str:
        """The one in use: the best, unless `use` chose another."""
        return str(self.c.hp_instruction_set().decode())

    @property
    def threads(self) -> int:
        """Threads of a call, its caller among them: one a physical core that the process may run on."""
        return int(self.c.hp_threads())

    def use(self, instruction_set: str) -> None:
        """Choose another instruction set, for tests and benchmarks. Raises ValueError for one that cannot run."""
        if self.c.hp_use_instruction_set(instruction_set.encode()):
            raise ValueError(f"{instruction_set!r} is none of {', '.join(self.instruction_sets)}")

    def set_threads(self, count: int) -> int:
        """Have `count` threads, within the cores there are; returns how many it became."""
        return int(self.c.hp_set_threads(count))


@functools.cache
def _open(path: Path) -> Library | str:
    """The library, or why it cannot be had."""
    if not path.exists():
        return f"{path.name} is not there: {_BUILD}"
    try:
        c = ctypes.CDLL(str(path))
        version = int(c.hp_version())
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded: {error}"
    if version != VERSION:
        return f"{path.name} has version {version} where {VERSION} is needed; {_BUILD} anew"
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(c, name)
        function.argtypes, function.restype = arguments, result
    return Library(c)


def load() -> Library:
    """The library. Raises PlatformError with the reason if it is missing, broken or of another version."""
    found = _open(PATH)
    if isinstance(found, str):
        raise PlatformError("the native CPU kernels are not available", why=found)
    return found


def refusal() -> str | None:
    """Why native kernels do not serve on this machine, in one clause; None where they do."""
    found = _open(PATH)
    if isinstance(found, str):
        return found
    if found.instruction_set == BASELINE:
        return "the processor has none of the instruction sets they are written for (AVX2 with FMA and F16C, or more)"
    return None


class ReplayEntry(ctypes.Structure):
    """`hp_replay_entry`: the address of a call's function, and its struct."""

    _fields_ = (("function", c_void_p), ("call", c_char_p))


_thread = threading.local()


def call(name: str, packed: bytes) -> None:
    """Make a call of a step with its struct, and note it where this thread records.

    Raises PlatformError unless it goes well.
    """
    if status := getattr(load().c, name)(packed):
        checked(status, name)
    note = getattr(_thread, "note", None)
    if note is not None:
        note(name, packed)


@contextlib.contextmanager
def noted(note: Callable[[str, bytes], None] | None) -> Iterator[None]:
    """Within it, `note` is told the name and the struct of every call that this thread makes; None: nobody is."""
    before = getattr(_thread, "note", None)
    _thread.note = note
    try:
        yield
    finally:
        _thread.note = before


def checked(status: int, call: str) -> None:
    """Raise PlatformError unless a call of the library went well."""
    if status:
        raise PlatformError(f"{call} of the native library failed", why=_STATUS.get(status, f"status {status}"))
