"""A GGUF file as a checkpoint: its metadata as a ModelConfig, its tensors under Hugging Face names.

Weights are dequantized here, at load, but for matrices that the model keeps in their groups.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hotplug.core.errors import UnsupportedModelError, WeightsError
from hotplug.core.weights.config import ModelConfig
from hotplug.core.weights.dequantize_target import DequantizeTarget, no_target
from hotplug.core.weights.dummy import parameter_shapes
from hotplug.core.weights.gguf_config import gguf_config
from hotplug.core.weights.gguf_file import GgufFile, GgufTensor
from hotplug.core.weights.packed_matrix import PackedMatrix
from hotplug.core.weights.promised import check_promised, some

_CHUNK = 4096
"""Quantization blocks dequantized at once: the temporaries stay in cache and the threads keep busy."""

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NUMBER = re.compile(r"0|[1-9][0-9]*")
_NOT_WEIGHTS = {"rope_freqs.weight"}
"""Read into the config; no parameter of the model."""


class GgufCheckpoint:
    """A GGUF file opened and checked: every tensor the config promises is there, in full and in its shape."""

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        self.files = (path,)
        self.config: ModelConfig = gguf_config(self._file)
        self._names = {
            hf_name(name, path): tensor for name, tensor in self._file.tensors.items() if name not in _NOT_WEIGHTS
        }
        self._check()

    @property
    def formats(self) -> Mapping[str, str]:
        """The type of each matrix, in lower case, by Hugging Face name."""
        return {name: tensor.kind.name.lower() for name, tensor in self._names.items() if len(tensor.shape) == 2}

    def tensors(
        self, keep: Collection[str] = (), target: DequantizeTarget = no_target
    ) -> Iterator[tuple[str, torch.Tensor | PackedMatrix]]:
        """Hugging Face names with CPU tensors: F16 and BF16 as stored, every other type as float32.

        Matrices in `keep` come in their groups, as views of the mapped file where rows need no other order.
        """
        formats = self.formats
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, tensor in self._names.items():
                data = self._raw(name, tensor)
                if name in keep and tensor.kind not in _PLAIN:
                    rows = _view(data.reshape(tensor.shape[0], -1))
                    yield name, PackedMatrix(formats[name], rows, torch.Size(tensor.shape))
                elif tensor.kind in _PLAIN:
                    yield (
                        name,
                        torch.from_numpy(data.reshape(-1).copy()).view(_PLAIN[tensor.kind]).reshape(tensor.shape),
                    )
                else:
                    out = target(name, tensor.shape)
                    out = torch.empty(tensor.shape) if out is None else out
                    dequantize(data, tensor.kind, pool, out)
                    yield name, out
                self._file.release()

    def release(self) -> None:
        """Give back the memory that what was read of the file holds in this process."""
        self._file.release()

    def _check(self) -> None:
        path = str(self.files[0])
        for kind in {tensor.kind for tensor in self._names.values()}:
            if not _dequantizable(kind):
                raise UnsupportedModelError(f"the quantization type {kind.name} is not read", where=path)
        shapes = {name: tensor.shape for name, tensor in self._names.items()}
        check_promised(shapes, self.config, path, {name: tensor.name for name, tensor in self._names.items()})
        if extra := sorted(self._names.keys() - parameter_shapes(self.config).keys()):
            raise WeightsError(f"{len(extra)} tensors have no place in the model", where=path, why=some(extra))

    def _raw(self, name: str, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, rows in Hugging Face order."""
        data = self._file.raw(tensor)
        if self._file.values["general.architecture"] == "llama":
            if ".q_proj." in name:
                data = _unpermute(data, self.config.num_heads, tensor)
            elif ".k_proj." in name:
                data = _unpermute(data, self.config.num_kv_heads, tensor)
        return data


def _view(data: npt.NDArray[np.uint8]) -> torch.Tensor:
    """A tensor of read-only bytes, without copying them; nobody writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(data)


def hf_name(name: str, path: Path) -> str:
    """The Hugging Face name of a GGUF tensor. Raises WeightsError for a name no served architecture has."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    prefix, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    if prefix == "blk" and _NUMBER.fullmatch(layer) and part in _LAYER_NAMES and kind in ("weight", "bias"):
        return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
    raise WeightsError(f"tensor {name!r} has no place in the model", where=str(path))


def dequantize(
    data: npt.NDArray[np.uint8], kind: GGMLQuantizationType, pool: ThreadPoolExecutor, out: torch.Tensor
) -> None:
    """Write the values of raw bytes to `out`, float32 and contiguous on the host."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks, values = data.reshape(-1, block_bytes), out.numpy().reshape(-1, block)

    def chunk(start: int) -> None:
        part = blocks[start : start + _CHUNK]
        # One row, because the package walks over rows in groups too small to be quick.
        values[start : start + _CHUNK] = gguf.quants.dequantize(part.reshape(1, -1), kind).reshape(-1, block)

    for _ in pool.map(chunk, range(0, len(blocks), _CHUNK)):
        pass


_PLAIN: dict[Any, torch.dtype] = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def _unpermute(data: npt.NDArray[np.uint8], heads: int, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
    """Undo the llama converter's reordering of query and key rows.

    The converter interleaves the two halves of each head (rotation of neighbouring pairs); Hugging Face
    models rotate the halves. Rows are whole quantization blocks, so raw bytes can be moved.
    """
    per_row = tensor.nbytes // tensor.shape[0]
    half = tensor.shape[0] // heads // 2
    return np.ascontiguousarray(data.reshape(heads, half, 2, per_row).swapaxes(1, 2))


def _dequantizable(kind: GGMLQuantizationType) -> bool:
    if kind in _PLAIN:
        return True
    try:
        gguf.quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
