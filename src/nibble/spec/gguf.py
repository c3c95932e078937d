"""The header of a GGUF file: its scalar values, and where each tensor lies.

    "GGUF", version, number of tensors, number of values, values, tensors, padding, data

Numbers are little endian, a string is its length and its bytes, a value is its key, its type and
itself. Arrays (the vocabulary) are stepped over, so the header of a large model takes a tenth of a
second where the gguf package's reader, which keeps every token, takes many. Every length is checked
against the file's. Format: ggml's docs/gguf.md, versions 2 and 3. No data is read here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nibble.errors import WeightError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_STRING_BYTES = 2**26
MAX_DIMS = 8
STRING, ARRAY = 8, 9
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}

Scalar = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor: `shape` with the slowest dim first (as torch), ggml's number of its type, and its
    place in the file in bytes."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """Scalar values by key, lengths of arrays by key, and the tensors in the file's order."""

    values: dict[str, Scalar]
    array_lengths: dict[str, int]
    tensors: tuple[GgufTensor, ...]
    num_bytes: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a .gguf file; WeightError when it is not there, not GGUF or damaged."""
    if not path.is_file():
        raise WeightError(f"{path} does not exist: give a .gguf file")
    try:
        with path.open("rb") as file:
            return _parse(_Reader(file, path.stat().st_size))
    except (ValueError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise WeightError(f"{path} is no whole GGUF file ({error}): fetch it again") from None


class _Reader:
    """Typed reads that never go beyond the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size

    def bytes(self, count: int) -> bytes:
        raw = self.file.read(count)
        if len(raw) != count:
            raise ValueError(f"the header ends after {self.size} bytes")
        return raw

    def number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self.bytes(struct.calcsize(code)))[0])

    def string(self) -> str:
        return self.bytes(self.length(MAX_STRING_BYTES)).decode()

    def length(self, limit: int) -> int:
        count = self.number("Q")
        if count > min(limit, self.size):
            raise ValueError(f"a length of {count} in its header")
        return count

    def skip(self, count: int) -> None:
        if self.file.tell() + count > self.size:
            raise ValueError(f"an array beyond its {self.size} bytes")
        self.file.seek(count, 1)

    def skip_array(self) -> int:
        kind, count = self.number("I"), self.length(self.size)
        if kind == STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        elif kind == ARRAY:
            for _ in range(count):
                self.skip_array()
        else:
            self.skip(count * struct.calcsize(SCALARS[kind]))
        return count


def _parse(reader: _Reader) -> GgufHeader:
    if reader.bytes(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = reader.number("I")
    if version not in VERSIONS:
        raise ValueError(f"version {version}; 2 and 3 are read, little endian")
    num_tensors, num_values = reader.length(reader.size), reader.length(reader.size)
    values: dict[str, Scalar] = {}
    array_lengths = {}
    for _ in range(num_values):
        key, kind = reader.string(), reader.number("I")
        if kind == ARRAY:
            array_lengths[key] = reader.skip_array()
        elif kind == STRING:
            values[key] = reader.string()
        else:
            code = SCALARS[kind]
            raw = struct.unpack(f"<{code}", reader.bytes(struct.calcsize(code)))[0]
            values[key] = raw
    found = [_tensor(reader) for _ in range(num_tensors)]
    alignment = int(values.get("general.alignment", DEFAULT_ALIGNMENT))
    if alignment < 1:
        raise ValueError(f"an alignment of {alignment}")
    start = -(-reader.file.tell() // alignment) * alignment
    tensors = tuple(
        GgufTensor(name=t.name, shape=t.shape, type_id=t.type_id, offset=start + t.offset)
        for t in found
    )
    return GgufHeader(
        values=values, array_lengths=array_lengths, tensors=tensors, num_bytes=reader.size
    )


def _tensor(reader: _Reader) -> GgufTensor:
    name, num_dims = reader.string(), reader.number("I")
    if num_dims > MAX_DIMS:
        raise ValueError(f"{name} has {num_dims} dims")
    shape = tuple(reader.number("Q") for _ in range(num_dims))
    type_id, offset = reader.number("I"), reader.number("Q")
    return GgufTensor(name=name, shape=shape[::-1], type_id=type_id, offset=offset)
