"""A folder of safetensors files, read with plain reads.

A file is 8 bytes of header length (little endian), a JSON header {name: {dtype, shape,
data_offsets}}, then the data. It is read with plain reads rather than mapped: mapped pages
count as the process's memory until the kernel takes them back, and loading a model must never look
as large as the model. Everything that can be wrong with a file is checked when it is opened: after
that only the disk can fail. Cost: one header per shard.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nibble.errors import WeightError
from nibble.nn.quant import PackedWeight
from nibble.spec.formats import FormatSpec
from nibble.weights.source import Entry, Source

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000
PAGES_FROM_BYTES = 2**20
NUM_READERS, PIECE_BYTES = 8, 64 << 20
INDEX_NAME = "model.safetensors.index.json"
SHARD = re.compile(r".+-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Where a tensor's bytes lie."""

    file: Path
    offset: int
    num_bytes: int
    entry: Entry

    def of_rows(self, rows: slice) -> Extent:
        """Where these rows lie."""
        count, *rest = self.entry.shape
        start, stop, _ = rows.indices(count)
        row_bytes = self.num_bytes // max(1, count)
        return Extent(
            file=self.file,
            offset=self.offset + start * row_bytes,
            num_bytes=(stop - start) * row_bytes,
            entry=Entry(shape=(stop - start, *rest), dtype=self.entry.dtype),
        )


class SafetensorsSource:
    """Sharded or single safetensors, as transformers and others write them."""

    native = False
    packed_spec: FormatSpec | None = None

    def __init__(self, folder: Path) -> None:
        """Open a folder and check every header. Raises WeightError for what is missing or
        damaged."""
        self._folder = folder
        self._extents: dict[str, Extent] = {}
        files, index = _shards(folder)
        for file in files:
            self._extents.update(read_header(file))
        lacking = sorted(name for name in index if name not in self._extents)
        if lacking:
            raise WeightError(
                f"{folder / INDEX_NAME} promises {lacking[0]} and {len(lacking) - 1} more that "
                "are in no "
                "shard: fetch the checkpoint again"
            )

    def entries(self) -> Mapping[str, Entry]:
        """All tensors by name."""
        return {name: extent.entry for name, extent in self._extents.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor | PackedWeight:
        """Read one tensor, or some of its rows alone, into host memory that it owns."""
        extent = self._extents[name]
        return read_tensor(extent if rows is None else extent.of_rows(rows))

    def bind(self, model: nn.Module) -> Source:
        """Itself: names are a checkpoint's."""
        return self

    def describe(self) -> str:
        """The folder."""
        return str(self._folder)


def read_tensor(extent: Extent) -> Tensor:
    """The tensor at an extent; WeightError when the file has become shorter since it was opened.

    The pieces of a large one are read side by side: what takes time is finding pages for them.
    """
    buffer = _buffer(extent.num_bytes)
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    starts = range(0, extent.num_bytes, PIECE_BYTES)
    with extent.file.open("rb", buffering=0) as file:

        def read(start: int) -> bool:
            piece = view[start : start + PIECE_BYTES]
            return read_into(file.fileno(), extent.offset + start, piece) == len(piece)

        if len(starts) < 2:
            whole = all(map(read, starts))
        else:
            with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="nibble-reader") as pool:
                whole = all(pool.map(read, starts))
    if not whole:
        raise WeightError(f"{extent.file} ended while it was read: fetch it again")
    if extent.entry.dtype == torch.uint8:
        return buffer.reshape(extent.entry.shape)
    return buffer.view(extent.entry.dtype).reshape(extent.entry.shape)


def read_into(handle: int, offset: int, target: memoryview) -> int:
    """Fill `target` from a place in a file; returns how many bytes there were."""
    done = 0
    while done < len(target):
        count = os.preadv(handle, [target[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def _buffer(num_bytes: int) -> Tensor:
    """Uninitialised bytes; large ones in pages of their own, which go back to the kernel at once.

    glibc's heap keeps up to 64 MiB of what was freed, and a tensor that is read between two others
    can pin far more.
    """
    if num_bytes < PAGES_FROM_BYTES:
        return torch.empty(num_bytes, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


def read_header(file: Path) -> dict[str, Extent]:
    """Names and extents of a safetensors file; WeightError when its length, header and offsets do
    not agree."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > min(MAX_HEADER_BYTES, size - 8):
            raise WeightError(
                f"{file} is no whole safetensors file ({size} bytes, header of {header_bytes}): "
                "fetch it again"
            )
        raw = stream.read(header_bytes)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("not an object")
        header.pop("__metadata__", None)
        start = 8 + header_bytes
        extents = {name: _extent(file, start, value) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightError(f"{file} has a damaged header ({error}): fetch it again") from None
    end = max((extent.offset + extent.num_bytes for extent in extents.values()), default=start)
    if end != size:
        word = "truncated" if size < end else "longer than its header says"
        raise WeightError(
            f"{file} is {word}: {size} bytes where the header needs {end}: fetch it again"
        )
    return extents


def _extent(file: Path, start: int, value: dict[str, Any]) -> Extent:
    dtype = DTYPES.get(value["dtype"])
    if dtype is None:
        raise ValueError(f"unknown dtype {value['dtype']}")
    shape = tuple(int(size) for size in value["shape"])
    begin, end = (int(offset) for offset in value["data_offsets"])
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"offsets {begin}..{end} do not hold {list(shape)} of {value['dtype']}")
    return Extent(
        file=file,
        offset=start + begin,
        num_bytes=end - begin,
        entry=Entry(shape=shape, dtype=dtype),
    )


def _shards(folder: Path) -> tuple[list[Path], set[str]]:
    """The files to read, and the names that an index promises."""
    index_file = folder / INDEX_NAME
    if index_file.is_file():
        return _indexed(folder, index_file)
    single = folder / "model.safetensors"
    if single.is_file():
        return [single], set()
    files = sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith("consolidated"))
    if not files:
        raise WeightError(f"{folder} holds no .safetensors file: there are no weights to read")
    numbered = [found for file in files if (found := SHARD.fullmatch(file.name))]
    if numbered and len(numbered) != int(numbered[0][2]):
        raise WeightError(
            f"{folder} holds {len(numbered)} of {int(numbered[0][2])} shards: fetch the others"
        )
    return files, set()


def _indexed(folder: Path, index_file: Path) -> tuple[list[Path], set[str]]:
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        names, shards = set(weight_map), sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightError(f"{index_file} is damaged ({error!r}): fetch it again") from None
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise WeightError(
            f"{index_file} names {missing[0]}, which is not there ({len(missing)} of {len(shards)} "
            "shards are missing): fetch them"
        )
    return [folder / shard for shard in shards], names
