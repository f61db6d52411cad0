"""Matrices as a checkpoint stores them: groups of 32 weights along a row, each with a scale.

The formats are GGUF's (ggml-common.h: `block_q4_0`, `block_q4_1`, `block_q8_0`): a group is its float16 scale, in
Q4_1 its float16 minimum too, then its weights. Four-bit weights lie two to a byte: low halves are the first sixteen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hotplug.core.errors import ConfigError
from hotplug.core.ops.packed_linear import GROUP, GROUP_BYTES, LINEAR
from hotplug.core.ops.registry import Op
from hotplug.core.quant.scheme import QuantizedRows
from hotplug.core.weights.packed_matrix import PackedMatrix

PACKED = "packed"
"""What `--quantization` calls keeping the checkpoint's groups."""
EMBED, HEAD = "embed", "logits"
"""Call sites of the vocabulary's tables."""

_BLOCKS = {"self_attn": "attn"}
_STACKED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "out",
            "gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}  # fmt: skip
"""What call sites call the blocks and matrices of checkpoints, those that a layer stacks by one name."""


@dataclass(frozen=True)
class PackedScheme:
    """Keeps groups of one format. Implements `QuantScheme`; floating-point weights are rounded to it."""

    name: str

    @property
    def op(self) -> Op:
        return LINEAR

    def tensors(self, out_features: int, in_features: int) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"data": ((out_features, in_features // GROUP * GROUP_BYTES[self.name]), torch.uint8)}

    def quantize(self, weight: Tensor) -> Sequence[Tensor]:
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType[self.name.upper()]
        rows = quants.quantize(np.ascontiguousarray(weight.to("cpu", torch.float32).numpy()), kind)
        return [torch.from_numpy(rows).to(weight.device)]

    def parameter(self, rows: int, columns: int, device: torch.device) -> nn.Parameter:
        """Uninitialized groups of a matrix."""
        ((shape, dtype),) = self.tensors(rows, columns).values()
        return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class PackedRows(QuantizedRows):
    """Destination of packed rows of one format, taken as they are. `rows` is a parameter, or some rows of one."""

    def __init__(self, scheme: PackedScheme, rows: Sequence[Tensor], columns: int) -> None:
        super().__init__(scheme, rows, columns, torch.float32)
        self.scheme, self._data = scheme.name, rows[0]

    def take(self, matrix: PackedMatrix) -> None:
        """Take `matrix`, of the same shape and format: the tensor itself where it is a whole parameter's, else a copy.

        So a parameter may be a view of the mapped file, which costs no memory of its own and must not be written to.
        """
        assert matrix.scheme == self.scheme
        if isinstance(self._data, nn.Parameter) and self._data.device == matrix.data.device:
            self._data.data = matrix.data
        else:
            self._data.copy_(matrix.data)


@dataclass(frozen=True)
class PackedFormats:
    """How a checkpoint stores the matrices that call sites read."""

    layers: PackedScheme
    """Of most linear layers."""
    table: PackedScheme | None
    """Of the head, and of an embedding that is tied to it; None: in floating point."""
    others: Mapping[str, PackedScheme | None]
    """Of the sites that differ."""

    @property
    def all(self) -> tuple[PackedScheme, ...]:
        """Each scheme once."""
        found = (self.layers, self.table, *self.others.values())
        return tuple(dict.fromkeys(scheme for scheme in found if scheme is not None))


def packed_formats(formats: Mapping[str, str]) -> PackedFormats:
    """`formats` by the call sites that read them, from the format of each matrix by its Hugging Face name.

    Raises ConfigError where a layer's matrix is in a format that is not known, or matrices that one site reads
    together differ.
    """
    sites: dict[str, set[str]] = {}
    for name, kind in formats.items():
        sites.setdefault(_site(name), set()).add(kind)
    tables = {site: sites.pop(site).pop() for site in (EMBED, HEAD) if site in sites}
    has = {kind for kinds in sites.values() for kind in kinds}
    if not has or not has <= GROUP_BYTES.keys():
        kinds = ", ".join(sorted(has | set(tables.values())))
        raise _not_packed(f"it has {kinds or 'floating point'}")
    if split := [site for site, kinds in sites.items() if len(kinds) > 1]:
        raise _not_packed(f"{split[0]} reads matrices in {' and '.join(sorted(sites[split[0]]))} together")
    by_site = {site: PackedScheme(kinds.pop()) for site, kinds in sites.items()}
    layers = Counter(by_site.values()).most_common(1)[0][0]
    by_table = {site: PackedScheme(kind) if kind in GROUP_BYTES else None for site, kind in tables.items()}
    table = by_table.get(HEAD, by_table.get(EMBED))
    others: dict[str, PackedScheme | None] = {s: scheme for s, scheme in by_site.items() if scheme != layers}
    others |= {s: scheme for s, scheme in by_table.items() if scheme != table}
    return PackedFormats(layers, table, others)


def _site(name: str) -> str:
    """The call site that reads a matrix, by its Hugging Face name."""
    prefix, _, matrix = name.removesuffix(".weight").removeprefix("model.").rpartition(".")
    if not prefix:
        return {"embed_tokens": EMBED, "lm_head": HEAD}.get(matrix, matrix)
    block, _, part = prefix.rpartition(".")
    return f"{block}.{_BLOCKS.get(part, part)}.{_STACKED.get(matrix, matrix)}"


def _not_packed(why: str) -> ConfigError:
    return ConfigError(
        f"the checkpoint does not store its matrices in {', '.join(GROUP_BYTES)}",
        where="--quantization packed",
        why=why,
        hint="Leave --quantization out, then it is served in floating point.",
    )
