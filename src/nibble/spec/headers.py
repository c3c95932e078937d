"""What a checkpoint holds, from its headers alone: name -> (shape, dtype, bytes).

Idea. Both formats begin with a table of contents, so the shapes of a 140 GB model cost a read of
some hundred kilobytes:

    safetensors   u64 n, n bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}}, data
    GGUF          "GGUF", u32 version, u64 tensors, u64 pairs; pairs (string, u32 type, value);
                  tensors (string, u32 dims, u64 dims[], u32 type, u64 offset), innermost dim first

Sources: the safetensors README, ggml's docs/gguf.md (versions 2 and 3). Offsets are checked against
the file's size, so a truncated download is found here, before anything is allocated. It never reads
tensor data and needs no torch; it is not a loader (that is `weights/`). Cost: one read a file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from nibble.errors import WeightError
from nibble.spec.gguf import GgufTensor, read_gguf_header

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself; a larger length is a damaged file."""

SAFETENSORS_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
}
"""Bits of an element by the name that safetensors gives its type."""

GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
"""ggml's tensor types: number -> (name, weights in a block, bytes of a block)."""


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """One stored tensor: logical shape (rows first), the file's name of its type, stored bytes."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def read_headers(path: str | Path) -> dict[str, TensorHeader]:
    """Headers of a .safetensors file, a .gguf file or a folder of safetensors (sharded or not).

    WeightError when there is nothing to read, a shard is missing, or a file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise WeightError(f"{path}: no such file; give a folder, a .safetensors or a .gguf file")
    if path.suffix == ".gguf":
        return read_gguf(path)[1]
    return read_safetensors(path)


def _read_folder(folder: Path) -> dict[str, TensorHeader]:
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    weight_map: dict[str, str] = {}
    if index.is_file():
        weight_map = _weight_map(index)
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise WeightError(
                f"{folder}: {len(missing)} of {len(files)} shards are missing, first {missing[0]}; "
                "download the model again"
            )
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    if not files:
        raise WeightError(
            f"{folder}: no .safetensors files in it (pickled .bin files are not read)"
        )
    found: dict[str, TensorHeader] = {}
    for file in files:
        found.update(read_safetensors(file))
    absent = sorted(set(weight_map) - set(found))
    if absent:
        raise WeightError(f"{folder}: the index names {absent[0]}, which no shard holds")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """The index's table: tensor name -> file name."""
    table = _json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise WeightError(f"{index}: no weight_map in it; download the model again")
    return table


def read_safetensors(path: Path) -> dict[str, TensorHeader]:
    """Headers of one safetensors file; WeightError if it is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length < 2 or length > min(MAX_HEADER_BYTES, size - 8):
            raise _damaged(path, "its header is cut off or not safetensors")
        raw = file.read(length)
    try:
        table = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(path, "its header is not JSON") from error
    if not isinstance(table, dict):
        raise _damaged(path, "its header is not a table of tensors")
    found: dict[str, TensorHeader] = {}
    end_of_data = 0
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        found[name], end = _safetensors_entry(path, name, entry)
        end_of_data = max(end_of_data, end)
    expected = 8 + length + end_of_data
    if size != expected:
        raise _damaged(path, f"it has {size} bytes where its header speaks of {expected}")
    return found


def _safetensors_entry(path: Path, name: str, entry: Any) -> tuple[TensorHeader, int]:
    try:
        shape = tuple(int(dim) for dim in entry["shape"])
        dtype = str(entry["dtype"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its entry for {name} is malformed") from error
    bits = SAFETENSORS_BITS.get(dtype)
    if bits is None:
        raise WeightError(f"{path}: {name} has the unknown type {dtype}")
    if (
        not 0 <= begin <= end
        or min(shape, default=0) < 0
        or (end - begin) * 8 != prod(shape) * bits
    ):
        raise _damaged(path, f"{name} of shape {list(shape)} {dtype} has {end - begin} bytes")
    return TensorHeader(shape=shape, dtype=dtype, nbytes=end - begin), end


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, TensorHeader]]:
    """Metadata and headers of a GGUF file; WeightError if it is cut off or malformed.

    Arrays (the vocabulary) are given as their length, under key + ".length".
    """
    header = read_gguf_header(path)
    lengths = {f"{key}.length": length for key, length in header.array_lengths.items()}
    found: dict[str, TensorHeader] = {}
    for tensor in header.tensors:
        found[tensor.name] = stored = _ggml_header(path, tensor)
        end = tensor.offset + stored.nbytes
        if end > header.num_bytes:
            raise _damaged(path, f"it has {header.num_bytes} bytes where its header needs {end}")
    return {**header.values, **lengths}, found


def _ggml_header(path: Path, tensor: GgufTensor) -> TensorHeader:
    if tensor.type_id not in GGML_TYPES:
        raise WeightError(
            f"{path}: {tensor.name} has ggml type {tensor.type_id}, which is not known here"
        )
    dtype, block, block_bytes = GGML_TYPES[tensor.type_id]
    if tensor.shape and tensor.shape[-1] % block:
        raise _damaged(
            path,
            f"{tensor.name}: rows of {tensor.shape[-1]} are not whole blocks of {dtype}",
        )
    nbytes = prod(tensor.shape) // block * block_bytes
    return TensorHeader(shape=tensor.shape, dtype=dtype, nbytes=nbytes)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; WeightError when it is missing or not a JSON object."""
    file = folder / "config.json"
    if not file.is_file():
        raise WeightError(
            f"{folder}: no config.json in it; give a folder that transformers can read"
        )
    return _json(file)


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightError(f"{file}: not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise WeightError(f"{file}: not a JSON object; download it again")
    return value


def _damaged(path: Path, why: str) -> WeightError:
    return WeightError(f"{path}: {why}; the file is damaged, download it again")
