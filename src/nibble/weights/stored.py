"""Packed weights as they lie in a file of the packed cache (packed_cache.py), and reading them.

A tensor is read when it is asked for, straight into the memory that keeps it, never through a
memory map, whose pages would count as the run's. What one process wrote has a checksum, and is
compared when it is read. What goes on to a device is read ahead by a few threads, as comparing
takes longer than copying.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from nibble.errors import WeightError
from nibble.nn.quant import PackedWeight
from nibble.weights.safetensors_source import NUM_READERS, PIECE_BYTES, Extent, read_into

NUM_AHEAD = 16
"""Weights that are read before they are asked for: half a GiB of an 8B."""
Pieces = tuple[tuple[int, int | None], ...]
"""Bytes and checksum of each part of a tensor that one process wrote, in order."""


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one packed weight in a file: read when asked for, and compared."""

    def __init__(self, extents: Mapping[str, Extent], checksums: Mapping[str, Pieces]) -> None:
        self._extents, self._checksums = extents, checksums
        self._read: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """Read into fresh host memory, once."""
        if name not in self._read:
            entry = self._extents[name].entry
            made = torch.empty(entry.shape, dtype=entry.dtype)
            self.read_into(name, made)
            self._read[name] = made
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._extents)

    def __len__(self) -> int:
        """How many tensors."""
        return len(self._extents)

    def entry(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type, without reading."""
        entry = self._extents[name].entry
        return entry.shape, entry.dtype

    def rows(self, rows: slice) -> StoredTensors:
        """Only these rows of each tensor. A checksum is of what one process wrote: other rows are
        read without being compared.
        """
        known: dict[str, Pieces] = {}
        for name, extent in self._extents.items():
            each = extent.num_bytes // extent.entry.shape[0]
            begin, size = rows.start * each, (rows.stop - rows.start) * each
            for length, checksum in self._checksums.get(name, ()):
                if begin == 0 and length == size:
                    known[name] = ((length, checksum),)
                begin -= length
        return StoredTensors({name: e.of_rows(rows) for name, e in self._extents.items()}, known)

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill a contiguous host tensor of this shape and type; threads may do so side by side.

        Raises WeightError when the file is shorter or other than what was written.
        """
        extent = self._extents[name]
        view = memoryview(target.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with extent.file.open("rb", buffering=0) as file:
            begin = 0
            for length, checksum in self._checksums.get(name, ((extent.num_bytes, None),)):
                found = _read_piece(file.fileno(), extent.offset + begin, view[begin:][:length])
                begin += length
                if checksum not in (None, found):
                    raise WeightError(
                        f"{extent.file} is damaged at {name}: delete it, and the next start packs "
                        "again"
                    )


def _read_piece(handle: int, offset: int, target: memoryview) -> int:
    """Fill `target` from a file; returns the checksum of what is there then."""
    found = 0
    for start in range(0, len(target), PIECE_BYTES):
        piece = target[start : start + PIECE_BYTES]
        read_into(handle, offset + start, piece)
        found = zlib.crc32(piece, found)
    return found


def read_ahead(weights: Iterable[tuple[str, PackedWeight]]) -> Iterator[tuple[str, PackedWeight]]:
    """The same weights in the same order, those that come next being read meanwhile.

    Raises WeightError for a damaged one when its turn comes.
    """
    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="nibble-reader") as pool:
        waiting: deque[tuple[str, PackedWeight, list[Future[Tensor]]]] = deque()

        def first() -> tuple[str, PackedWeight]:
            name, packed, reads = waiting.popleft()
            for read in reads:
                read.result()
            return name, packed

        for name, packed in weights:
            reads = [pool.submit(packed.tensors.__getitem__, leaf) for leaf in packed.tensors]
            waiting.append((name, packed, reads))
            if len(waiting) > NUM_AHEAD:
                yield first()
        while waiting:
            yield first()
