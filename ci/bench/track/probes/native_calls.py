"""Calls of the CPU's native library, for a counter of instructions: `python native_calls.py LIBRARY linear|attention`.

Standard library only, since under a counter everything takes fifty times as long. One thread; prints the instruction
set in use. Structs are those of version 4 of its header (`hotplug_cpu.h`).
"""

from __future__ import annotations

import ctypes
import struct
import sys
from array import array

VERSION = 4
Q4_1, GROUP_BYTES, GROUP = 3, 20, 32
ROWS, COLS = 960, 576
HEADS, KV_HEADS, DIM, BLOCK, CONTEXT = 9, 3, 64, 16, 96


def main() -> None:
    c = ctypes.CDLL(sys.argv[1])
    if c.hp_version() != VERSION:
        sys.exit(f"the library has version {c.hp_version()}, and this script is for {VERSION}")
    c.hp_instruction_set.restype = ctypes.c_char_p
    c.hp_packed_bytes.restype = ctypes.c_int64
    c.hp_packed_bytes.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    c.hp_pack.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    c.hp_set_threads(1)
    {"linear": _linear, "attention": _attention}[sys.argv[2]](c)
    print(c.hp_instruction_set().decode())


def _checked(status: int) -> None:
    if status:
        raise RuntimeError(f"a call answered {status}")


def _aligned(size: int) -> tuple[ctypes.Array[ctypes.c_char], int]:
    memory = ctypes.create_string_buffer(size + 64)
    return memory, -(-ctypes.addressof(memory) // 64) * 64


def _linear(c: ctypes.CDLL) -> None:
    """One row and 16 rows."""
    groups = bytes(range(GROUP_BYTES)) * (ROWS * COLS // GROUP)
    kept, packed = _aligned(c.hp_packed_bytes(Q4_1, ROWS, COLS))
    _checked(c.hp_pack(Q4_1, groups, ROWS, COLS, packed))
    for n in (1, 16):
        x, out = array("f", [0.5]) * (n * COLS), array("f", [0.0]) * (n * ROWS)
        fields = (packed, x.buffer_info()[0], 0, out.buffer_info()[0], Q4_1, ROWS, COLS, n, COLS, ROWS)
        _checked(c.hp_linear(struct.pack("@4P6q", *fields)))
    del kept


def _attention(c: ctypes.CDLL) -> None:
    """Four decodes."""
    requests, blocks = 4, 4 * CONTEXT // BLOCK
    cache = array("f", [0.25]) * (blocks * BLOCK * KV_HEADS * DIM)
    q, out = array("f", [0.5]) * (requests * HEADS * DIM), array("f", [0.0]) * (requests * HEADS * DIM)
    table, start = array("q", range(blocks)), array("q", range(requests + 1))
    lens = array("q", [CONTEXT] * requests)
    strides = (BLOCK * KV_HEADS * DIM, KV_HEADS * DIM, DIM)
    pointers = [part.buffer_info()[0] for part in (q, cache, cache, out, table, start, lens)]
    numbers = (requests, HEADS * DIM, DIM, *strides, *strides, CONTEXT // BLOCK, CONTEXT // BLOCK, requests,
               HEADS, KV_HEADS, DIM, blocks, BLOCK, 0, 0)  # fmt: skip
    _checked(c.hp_attention(struct.pack("@8P19q2d", *pointers, 0, *numbers, DIM**-0.5, 0.0)))


if __name__ == "__main__":
    main()
