"""The embedded model in the formats that peers are measured with: its GGUF file with other types for the matrices."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

KINDS = ("Q4_0", "Q4_1", "Q8_0", "F16")


def write_variant(source: Path, target: Path, kind: str) -> None:
    """`source` with every matrix but the embedding in `kind`; the embedding, the head too, in Q8_0, or F16 with F16.

    A matrix that is of the type already is copied as it is; others go through float32.
    """
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            part = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], part)
    for tensor in reader.tensors:
        wanted = GGMLQuantizationType[kind]
        if tensor.name == "token_embd.weight" and kind != "F16":
            wanted = GGMLQuantizationType.Q8_0
        if tensor.tensor_type in (wanted, GGMLQuantizationType.F32):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
