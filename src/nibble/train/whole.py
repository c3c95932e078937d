"""Whole tensors on disk, whatever number of processes holds their parts.

    writing   sizes of all parts to everybody, then tensor after tensor to the first process, which
              writes each one at its place: one tensor in host memory at a time
    reading   every process reads its own slice

Names of optimiser state are `PARAMETER/STATE`. Block-wise 8-bit state (numerics/codec8.py) is kept
as the parts had it, with their sizes and the dim that was cut beside it: a process that holds the
same part again gets the same bytes, and any other cut, or none, goes through fp32 and is encoded
anew. It never computes anything else
and knows no devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nibble.errors import CheckpointError
from nibble.numerics import codec8
from nibble.optim.shards import FLAT, ShardView
from nibble.place.base import Placement
from nibble.spec.state import BLOCK, RULES
from nibble.weights.files import Shape, write_in_turn

CODES, ABSMAX = "_codes", "_absmax"
SIGNED = {
    slot.name: slot.signed for rule in RULES.values() for slot in (*rule.matrix, *rule.vector)
}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What lives here of a tensor, cut along `dim` (None: all of it, the same everywhere). `shape`:
    of the whole, which a part that is cut as a line does not show.
    """

    tensor: Tensor
    dim: int | None = None
    shape: tuple[int, ...] | None = None

    @classmethod
    def of(cls, tensor: Tensor, view: ShardView | None) -> Piece:
        """A part of a trained tensor, as it is cut."""
        if view is None or view.dim is None:
            return cls(tensor=tensor)
        return cls(tensor=tensor, dim=view.dim, shape=view.shape if view.dim == FLAT else None)


def write_whole(
    path: Path, pieces: Mapping[str, Piece], place: Placement | None
) -> dict[str, list[int]]:
    """Write the whole tensors of which `pieces` live here; all processes must come.

    Returns the sizes of the parts of each tensor that was cut. On the first process an OSError is
    raised when all tensors have come, so that nobody is left waiting.
    """
    sizes = _sizes(pieces, place)
    writes = place is None or place.rank == 0
    failure: OSError | None = None
    write: Callable[[str, Tensor], None] | None = None
    if writes:
        shapes = {name: _whole_shape(piece, sizes.get(name)) for name, piece in pieces.items()}
        try:
            write = write_in_turn(path, shapes, metadata={"format": "pt"})
        except OSError as error:
            failure = error
    for name, piece in pieces.items():
        whole = _collected(piece, sizes.get(name, []), place)
        if whole is None or write is None or failure is not None:
            continue
        try:
            write(name, whole)
        except OSError as error:
            failure = error
        del whole
    if failure is not None:
        raise failure
    return sizes


def _collected(piece: Piece, sizes: Sequence[int], place: Placement | None) -> Tensor | None:
    if place is None:
        return piece.tensor.detach().cpu()
    whole = place.whole(piece.tensor, piece.dim, sizes)
    return whole if whole is None or piece.shape is None else whole.view(piece.shape)


def _sizes(pieces: Mapping[str, Piece], place: Placement | None) -> dict[str, list[int]]:
    """How long each part of what is cut is."""
    mine = {n: p.tensor.shape[p.dim] for n, p in pieces.items() if p.dim is not None}
    if place is None or place.num_parts == 1:
        return {}
    tables = place.group.gather(mine, "the sizes of a checkpoint")[: place.num_parts]
    if any(table.keys() != mine.keys() for table in tables):
        raise CheckpointError("the processes hold different state: start them with one recipe")
    return {name: [table[name] for table in tables] for name in mine}


def _whole_shape(piece: Piece, sizes: Sequence[int] | None) -> Shape:
    if piece.shape is not None:
        return Shape(shape=piece.shape, dtype=piece.tensor.dtype)
    shape = list(piece.tensor.shape)
    if piece.dim is not None and sizes is not None:
        shape[piece.dim] = sum(sizes)
    return Shape(shape=tuple(shape), dtype=piece.tensor.dtype)


def in_one_codec(pieces: dict[str, Piece], place: Placement | None) -> list[str]:
    """Decode, in place, 8-bit states whose other parts are fp32, being too small for 8 bits.

    Returns the names (`PARAMETER/SLOT`) of what was decoded here.
    """
    if place is None or place.num_parts == 1:
        return []
    coded = {name.removesuffix(CODES) for name in pieces if name.endswith(CODES)}
    plain = {name for name in pieces if name.rpartition("/")[2] in SIGNED}
    every = place.group.gather((coded, plain), "the codecs of optimiser state")
    mixed = coded & set().union(*(theirs for _, theirs in every))
    for name in sorted(mixed):
        codes, absmax = pieces.pop(f"{name}{CODES}"), pieces.pop(f"{name}{ABSMAX}")
        values = _decoded(codes.tensor.cpu(), absmax.tensor.cpu(), name.rpartition("/")[2])
        pieces[name] = Piece(tensor=values, dim=codes.dim, shape=codes.shape)
    return sorted(mixed)


class WholeFile:
    """A file of whole tensors, of which slices are read. Raises CheckpointError for a damaged
    one.

    `sizes` are those of the parts of 8-bit codes by name, `dims` along what they were cut (not
    given: as a reader cuts them).
    """

    def __init__(
        self,
        path: Path,
        sizes: Mapping[str, Sequence[int]] | None = None,
        dims: Mapping[str, int] | None = None,
    ) -> None:
        self._path = path
        self._sizes, self._dims = sizes or {}, dims or {}
        try:
            self._file: Any = safe_open(path, framework="pt")
            self.names = frozenset(self._file.keys())  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str, dim: int | None = None, rows: slice | None = None) -> Tensor:
        """A tensor, or the indices `rows` of it along `dim`."""
        try:
            if dim is None or rows is None:
                found: Tensor = self._file.get_tensor(name)
                return found
            return self._slice(name, dim, rows)
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from None

    def _slice(self, name: str, dim: int, rows: slice) -> Tensor:
        if dim == FLAT:
            return self._line(name, rows)
        if rows.start == rows.stop:
            shape = list(self.shape(name))
            shape[dim] = 0
            return self._file.get_slice(name)[:1].new_empty(shape)  # type: ignore[no-any-return]
        index = (*(slice(None),) * dim, rows)
        found: Tensor = self._file.get_slice(name)[index]
        return found

    def _line(self, name: str, rows: slice) -> Tensor:
        """A range of a tensor's numbers in a line, from the rows that it lies in."""
        shape = self.shape(name)
        if not shape:
            whole: Tensor = self._file.get_tensor(name)
            return whole.view(-1)[rows]
        width = max(1, prod(shape[1:]))
        first, last = rows.start // width, -(-rows.stop // width)
        found: Tensor = self._slice(name, 0, slice(first, last)).reshape(-1)
        return found[rows.start - first * width : rows.stop - first * width]

    def read_slot(
        self, name: str, dim: int | None, rows: slice | None, *, as_8bit: bool
    ) -> dict[str, Tensor]:
        """What the state `name` (`PARAMETER/SLOT`) stores for the indices `rows` along `dim`.

        Kept as it is where parts begin and end alike; else by way of fp32.
        """
        slot = name.rpartition("/")[2]
        if f"{name}{CODES}" not in self.names:
            values = self.read(name, dim, rows)
            return _encoded(values, slot) if as_8bit else {slot: values}
        cut = self._dims.get(f"{name}{CODES}", dim)
        if cut != dim:
            values = self._decoded_whole(name, cut)
            if dim == FLAT:
                values = values.reshape(-1)
            if dim is not None and rows is not None:
                values = values[(*(slice(None),) * dim, rows)]
            return _encoded(values, slot) if as_8bit else {slot: values}
        parts = self._parts(name, dim, rows)
        if as_8bit and len(parts) == 1 and parts[0].is_all:
            codes, absmax = self._coded(name, dim, parts[0])
            return {f"{slot}{CODES}": codes, f"{slot}{ABSMAX}": absmax}
        found = []
        for part in parts:
            codes, absmax = self._coded(name, dim, part)
            values = _decoded(codes, absmax, slot)
            kept = slice(part.first - part.start, part.last - part.start)
            found.append(values if dim is None else values[(*(slice(None),) * dim, kept)])
        if not found:  # no index lives here
            found = [self.read(f"{name}{CODES}", dim, slice(0, 0)).float()]
        values = found[0] if len(found) == 1 else torch.cat(found, dim=dim or 0)
        if not as_8bit:
            return {slot: values}
        return _encoded(values, slot)

    def _decoded_whole(self, name: str, cut: int | None) -> Tensor:
        """fp32 of all parts of a state together, which were cut along `cut`."""
        slot = name.rpartition("/")[2]
        values = [
            _decoded(*self._coded(name, cut, part), slot) for part in self._parts(name, cut, None)
        ]
        return torch.cat(values, dim=cut or 0).view(self.shape(f"{name}{CODES}"))

    def _parts(self, name: str, dim: int | None, rows: slice | None) -> list[_Stored]:
        """The stored parts that the wanted indices lie in."""
        shape = self.shape(f"{name}{CODES}")
        if dim == FLAT:
            shape = (prod(shape),)
        along = 0 if dim is None else dim
        size = shape[along] if shape else 1
        cuts = list(self._sizes.get(f"{name}{CODES}", [size]))
        first, last = (0, size) if rows is None else (rows.start, rows.stop)
        if dim is None and len(cuts) > 1:
            raise CheckpointError(f"{self._path}: {name} is cut, but not here")
        per_index = prod(shape) // max(1, size)
        found, start, block = [], 0, 0
        for length in cuts:
            num_blocks = -(-length * per_index // BLOCK)
            if max(first, start) < min(last, start + length):
                found.append(
                    _Stored(
                        start=start,
                        length=length,
                        block=block,
                        num_blocks=num_blocks,
                        first=max(first, start),
                        last=min(last, start + length),
                        is_all=(first, last) == (start, start + length),
                    )
                )
            start, block = start + length, block + num_blocks
        return found

    def _coded(self, name: str, dim: int | None, part: _Stored) -> tuple[Tensor, Tensor]:
        rows = slice(part.start, part.start + part.length)
        codes = self.read(f"{name}{CODES}", dim, None if dim is None else rows)
        blocks = slice(part.block, part.block + part.num_blocks)
        return codes, self.read(f"{name}{ABSMAX}", 0, blocks)

    def _damaged(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self._path} cannot be read ({error}): use an older checkpoint")


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A stored part and the indices of it that are wanted, `first` to `last`."""

    start: int
    length: int
    block: int
    num_blocks: int
    first: int
    last: int
    is_all: bool


def rows_of(view: ShardView, size: int) -> slice:
    """The indices along the view's dim that live here, `size` of them."""
    return slice(view.start, view.start + size)


def _decoded(codes: Tensor, absmax: Tensor, slot: str) -> Tensor:
    """fp32 of a part of an 8-bit state."""
    signed = SIGNED[slot]
    padded = torch.full(
        (absmax.numel() * BLOCK,), codec8.zero_code(signed=signed), dtype=torch.uint8
    )
    padded[: codes.numel()] = codes.reshape(-1)
    values = codec8.decode_blocks(padded.view(-1, BLOCK), absmax, signed=signed)
    return values.view(-1)[: codes.numel()].view(codes.shape)


def encoded_blocks(values: Tensor, slot: str) -> tuple[Tensor, Tensor]:
    """Codes and maxima of fp32 values, as the 8-bit codec stores them."""
    padded = torch.zeros(-(-values.numel() // BLOCK) * BLOCK)
    padded[: values.numel()] = values.reshape(-1)
    codes, absmax = codec8.encode_blocks(padded.view(-1, BLOCK), signed=SIGNED[slot])
    return codes.view(-1)[: values.numel()].view(values.shape), absmax


def _encoded(values: Tensor, slot: str) -> dict[str, Tensor]:
    codes, absmax = encoded_blocks(values, slot)
    return {f"{slot}{CODES}": codes, f"{slot}{ABSMAX}": absmax}
