"""Small model files and mutants of them, made from a seed: for finding what a reader does with what nobody wrote.

A mutant is a valid file in which one to three things are changed: a value (of the dictionary of nasty ones), its type,
its length, a count or an offset, some bits; or it is cut off.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

DEEP_LIST, DEEP_OBJECT = "@deep list@", "@deep object@"
_DEEP = {DEEP_LIST: "[" * 2000 + "]" * 2000, DEEP_OBJECT: '{"a":' * 2000 + "1" + "}" * 2000}
NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 255, 4096, 9_999, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**400, 0.0, -0.5, 0.5, 1.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), "", "x", "0", "nan", "\x00", "é",
    "x" * 10_000, "\ud800",
    "linear", "yarn", "llama3", "longrope", "llama", "qwen2", "float16", "../../etc/passwd", [], {},
    [None], [-1], [2**63], ["a"], [[[]]], {"a": {"b": 1}}, {"type": "yarn"}, {"rope_type": "linear", "factor": 0},
    {"type": "yarn", "factor": 1e308}, {"full_attention": {"rope_type": "default"}}, DEEP_LIST, DEEP_OBJECT,
]  # fmt: skip

HIDDEN, INNER, LAYERS = 32, 64, 2
ALPHABET = [chr(0x21 + i) if i < 94 else chr(0x100 + i) for i in range(256)]


# --- JSON -----------------------------------------------------------------------------------------


def mutate_json(text: str, rng: random.Random) -> bytes:
    """A mutant of a JSON document."""
    roll = rng.random()
    if roll < 0.15:
        return _flip(text.encode(), rng, len(text))
    if roll < 0.2:
        return text.encode()[: rng.randrange(len(text))]
    if roll < 0.25:
        return rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"[" * 3000, b'{"a":' * 500]) + text.encode()
    document = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        _change(document, rng)
    text = json.dumps(document)
    for mark, deep in _DEEP.items():
        text = text.replace(json.dumps(mark), deep)
    if rng.random() < 0.05:
        text = text[:-1] + ", " + text[1:]  # every key twice
    return text.encode()


def _change(document: Any, rng: random.Random) -> None:
    """Change, add or remove one value somewhere in a document."""
    holder = document
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.7:
            holder = holder[key]
            continue
        break
    roll = rng.random()
    if roll < 0.1:
        del holder[key]
    elif roll < 0.2 and isinstance(holder, dict):
        added = ["rope_scaling", "rope_parameters", "head_dim", "sliding_window", "layer_types", "quantization_config"]
        holder[rng.choice(added)] = rng.choice(NASTY)
    elif roll < 0.35:
        holder[key] = [holder[key]]
    elif roll < 0.4:
        holder[key] = str(holder[key])
    else:
        holder[key] = rng.choice(NASTY)


def _flip(data: bytes, rng: random.Random, end: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(end, len(changed)))
        changed[at] = rng.choice([changed[at] ^ 1 << rng.randrange(8), 0, 0xFF, rng.randrange(256)])
    return bytes(changed)


# --- safetensors ----------------------------------------------------------------------------------


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A mutant of a safetensors file."""
    (size,) = struct.unpack_from("<Q", data)
    roll = rng.random()
    if roll < 0.2:
        return _flip(data, rng, 8 + size)
    if roll < 0.3:
        return data[: rng.randrange(len(data))]
    if roll < 0.4:
        return struct.pack("<Q", rng.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])) + data[8:]
    header = mutate_json(data[8 : 8 + size].decode(), rng)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


# --- GGUF -----------------------------------------------------------------------------------------

_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass
class Gguf:
    """What a GGUF file says: key, type, value (of an array: the type of its items and they), tensors."""

    values: list[tuple[str, int, Any]]
    tensors: list[tuple[str, tuple[int, ...], int, int]]
    """Name, shape with the innermost dimension first, type, offset."""
    data: bytes
    counts: tuple[int, int] | None = None
    version: int = 3
    lengths: dict[int, int] = field(default_factory=dict)
    """Array of the n-th value -> the length that it claims."""

    def encode(self) -> bytes:
        tensors, keys = self.counts or (len(self.tensors), len(self.values))
        out = [b"GGUF", struct.pack("<IQQ", self.version, tensors, keys)]
        for i, (key, kind, value) in enumerate(self.values):
            out += [_string(key), struct.pack("<I", kind), _encoded(kind, value, self.lengths.get(i))]
        for name, shape, kind, offset in self.tensors:
            out += [_string(name), struct.pack(f"<I{len(shape)}Q", len(shape), *(n % 2**64 for n in shape))]
            out.append(struct.pack("<IQ", kind % 2**32, offset % 2**64))
        header = b"".join(out)
        return header + bytes(-len(header) % 32) + self.data


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _encoded(kind: int, value: Any, claimed: int | None = None) -> bytes:
    if kind == _STRING:
        return _string(str(value))
    if kind == _ARRAY:
        item, items = value if isinstance(value, tuple) else (4, [])
        return struct.pack("<IQ", item % 2**32, len(items) if claimed is None else claimed) + b"".join(
            _encoded(item, one) for one in items
        )
    code = _CODES.get(kind)
    if code is None:
        return struct.pack("<Q", 0)
    try:
        return struct.pack("<" + code, value)
    except (struct.error, OverflowError, TypeError, ValueError):  # the bits of what does not fit
        number = int(value) if isinstance(value, int) else len(str(value))
        return (number % 2**64).to_bytes(8, "little")[: struct.calcsize(code)]


def small_gguf(model: str = "gpt2") -> Gguf:
    """A Llama of two layers with a tokenizer, valid."""
    tokens = ["<s>", "</s>", *ALPHABET]
    vocab = len(tokens)
    types = [3, 3, *[1] * 256]
    values: list[tuple[str, int, Any]] = [
        ("general.architecture", _STRING, "llama"), ("general.file_type", 4, 0), ("llama.block_count", 4, LAYERS),
        ("llama.context_length", 4, 64), ("llama.embedding_length", 4, HIDDEN), ("llama.feed_forward_length", 4, INNER),
        ("llama.attention.head_count", 4, 4), ("llama.attention.head_count_kv", 4, 2),
        ("llama.attention.layer_norm_rms_epsilon", 6, 1e-5), ("llama.rope.freq_base", 6, 10000.0),
        ("llama.rope.dimension_count", 4, 8), ("llama.rope.scaling.type", _STRING, "yarn"),
        ("llama.rope.scaling.factor", 6, 2.0), ("llama.rope.scaling.original_context_length", 4, 32),
        ("llama.attention.sliding_window", 4, 16), ("split.count", 2, 0), ("general.alignment", 4, 32),
        ("tokenizer.ggml.model", _STRING, model), ("tokenizer.ggml.tokens", _ARRAY, (_STRING, tokens)),
        ("tokenizer.ggml.token_type", _ARRAY, (5, types)), ("tokenizer.ggml.bos_token_id", 4, 0),
        ("tokenizer.ggml.eos_token_id", 4, 1), ("tokenizer.ggml.add_bos_token", 7, True),
        ("tokenizer.ggml.unknown_token_id", 4, 0), ("tokenizer.chat_template", _STRING, "{{ messages }}"),
    ]  # fmt: skip
    if model == "gpt2":
        pairs = [f"{ALPHABET[i]} {ALPHABET[i + 1]}" for i in (40, 50)]
        tokens[-2:] = [pair.replace(" ", "") for pair in pairs]
        values += [("tokenizer.ggml.pre", _STRING, "smollm"), ("tokenizer.ggml.merges", _ARRAY, (_STRING, pairs))]
    else:
        values.append(("tokenizer.ggml.scores", _ARRAY, (6, [-float(i) for i in range(vocab)])))
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (HIDDEN, vocab), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        sizes = {"attn_q": (HIDDEN, HIDDEN),
                 "attn_k": (HIDDEN, 16), "attn_v": (HIDDEN, 16), "ffn_gate": (HIDDEN, INNER),
                 "attn_output": (HIDDEN, HIDDEN), "ffn_up": (HIDDEN, INNER), "ffn_down": (INNER, HIDDEN),
                 "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}  # fmt: skip
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in sizes.items()}
    tensors, data = [], b""
    for name, shape in shapes.items():
        tensors.append((name, shape, 0, len(data)))
        data += np.random.default_rng(len(data)).normal(0, 0.1, int(np.prod(shape))).astype("<f4").tobytes()
    return Gguf(values, tensors, data)


def mutate_gguf(base: Gguf, rng: random.Random) -> bytes:
    """A mutant of a GGUF file."""
    file = replace(base, values=list(base.values), tensors=list(base.tensors), lengths={})
    roll = rng.random()
    header = len(file.encode()) - len(file.data)
    if roll < 0.25:
        return _flip(file.encode(), rng, header)
    if roll < 0.3:
        return file.encode()[: rng.randrange(len(file.encode()))]
    if roll < 0.35:
        file.counts = rng.choice([(2**63, 3), (3, 2**63), (2**20, 30), (2**16, 26), (0, 0), (20, 2**31)])
    for _ in range(rng.randint(1, 3)):
        rng.choice(_GGUF_CHANGES)(file, rng)
    return file.encode()


def _gguf_value(file: Gguf, rng: random.Random) -> None:
    at = rng.randrange(len(file.values))
    key, kind, value = file.values[at]
    nasty = rng.choice(NASTY)
    if kind == _ARRAY and value[1]:
        items = list(value[1])
        items[rng.randrange(len(items))] = nasty
        file.values[at] = (key, kind, (value[0], items))
    else:
        file.values[at] = (key, kind, nasty if kind == _STRING or isinstance(nasty, int | float) else 0)


def _gguf_type(file: Gguf, rng: random.Random) -> None:
    at = rng.randrange(len(file.values))
    key, kind, value = file.values[at]
    items = value[1] if kind == _ARRAY else [value]
    new: tuple[int, Any] = rng.choice([
        *((code, items[0] if items else 0) for code in _CODES), (_STRING, value), (13, 0), (_ARRAY, (_STRING, items)),
        (_ARRAY, (4, [len(str(item)) for item in items])), (_ARRAY, (6, [float("nan")] * len(items))),
        (_ARRAY, (_ARRAY, [(4, [1]), (4, [2])])), (_ARRAY, (99, [])), (_ARRAY, (4, [])), (_ARRAY, _nested(2000)),
    ])  # fmt: skip
    file.values[at] = (key, *new)


def _nested(depth: int) -> tuple[int, Any]:
    value: tuple[int, Any] = (4, [1])
    for _ in range(min(depth, 300)):  # as deep as this module's own recursion goes
        value = (_ARRAY, [value])
    return value


def _gguf_length(file: Gguf, rng: random.Random) -> None:
    arrays = [i for i, (_, kind, _) in enumerate(file.values) if kind == _ARRAY]
    file.lengths[rng.choice(arrays)] = rng.choice([0, 1, 257, 259, 2**20, 2**31, 2**63, 2**64 - 1])


def _gguf_shorter(file: Gguf, rng: random.Random) -> None:
    arrays = [i for i, (_, kind, value) in enumerate(file.values) if kind == _ARRAY and len(value[1]) > 1]
    if arrays:
        at = rng.choice(arrays)
        key, kind, (item, items) = file.values[at]
        file.values[at] = (key, kind, (item, [*items, items[0]] if rng.random() < 0.5 else items[:-1]))


def _gguf_keys(file: Gguf, rng: random.Random) -> None:
    at = rng.randrange(len(file.values))
    if rng.random() < 0.5:
        del file.values[at]
    else:
        file.values.append(file.values[at])


def _gguf_tensor(file: Gguf, rng: random.Random) -> None:
    at = rng.randrange(len(file.tensors))
    name, shape, kind, offset = file.tensors[at]
    number = rng.choice([0, 1, 31, 33, 2**20, 2**31, 2**62, 2**63, 2**64 - 1])
    file.tensors[at] = rng.choice([
        (name, (number, *shape[1:]), kind, offset), (name, (*shape, number), kind, offset), (name, (), kind, offset),
        (name, shape, rng.choice([1, 2, 3, 8, 12, 30, 39, 99, number]), offset), (name, shape, kind, number),
        (name, shape, kind, offset + 32), (file.tensors[0][0], shape, kind, offset), (name[:5], shape, kind, offset),
        (name * 20, shape, kind, offset), ("blk.99999999.attn_q.weight", shape, kind, offset),
    ])  # fmt: skip


_GGUF_CHANGES: list[Callable[[Gguf, random.Random], None]] = [
    _gguf_value, _gguf_value, _gguf_value, _gguf_type, _gguf_length, _gguf_shorter, _gguf_keys, _gguf_tensor,
]  # fmt: skip


# --- folders --------------------------------------------------------------------------------------


def mutate_folder(files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """A Hugging Face folder, as file contents by name, in which one file is a mutant."""
    names = list(files)
    weights = [2 if name == "config.json" else 1 for name in names]
    name = rng.choices(names, weights)[0]
    mutate = mutate_safetensors if name.endswith(".safetensors") else lambda data, r: mutate_json(data.decode(), r)
    return {**files, name: mutate(files[name], rng)}


def read_folder(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)
