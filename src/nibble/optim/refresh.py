"""New bases of many matrices that are due in one step, made together.

Randomised bases of one rank share the factoring of their Gram matrices (numerics/lowrank.py), in
chunks whose temporaries stay under REFRESH_NBYTES, beside those of the one matrix that is at work.
Bases by SVD or at random are made one by one.

Chunks are cut by the shapes of whole matrices in the order that these are given in, which steps and
options decide. So they are the same on all processes and in a resumed run, and what is added over
the parts of matrices is added in one order. On a CPU a basis has the same bits in any chunk. On a
GPU the library may take another kernel for another number of matrices: equal runs still have equal
bits, and a matrix that steps alone (in backward) differs by rounding at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nibble.numerics import lowrank
from nibble.optim.projection import Projection

REFRESH_NBYTES = 512 * 2**20
"""Bound on what a chunk of bases in the making holds."""
# Of Gram matrices, their factors and inverses, for each element.
_GRAM_BYTES = 20


class Due(NamedTuple):
    """A projected parameter whose basis is to be made anew from `matrix`, what lives here of its
    gradient; in use from `step` on, counted from 0.
    """

    projection: Projection
    state: dict[str, Any]
    matrix: Tensor
    step: int


class _Side(NamedTuple):
    """One basis of a matrix that is due."""

    due: Due
    side: str


def refresh_(all_due: Iterable[Due]) -> None:
    """Make and keep new bases of all these matrices."""
    sketched: dict[tuple[object, ...], list[_Side]] = {}
    for due in all_due:
        low, matrix = due.projection.low, due.matrix
        if low.basis != "randomised":
            bases = due.projection.new_bases(due.state, matrix)
            due.projection.refresh_(due.state, bases, step=due.step)
            continue
        for side in low.sides(due.projection.shape):
            kind = (low.rank, matrix.device, matrix.dtype == torch.float32)
            sketched.setdefault(kind, []).append(_Side(due, side))
    for sides in sketched.values():
        for chunk in _chunks(sides):
            _refresh_chunk_(chunk)


def _refresh_chunk_(chunk: Sequence[_Side]) -> None:
    """Bases of a chunk, kept as soon as those of a matrix are complete."""
    makings = [due.projection.making(due.state, due.matrix, side) for due, side in chunk]
    found: dict[str, Tensor] = {}
    for (due, side), basis in zip(chunk, lowrank.together(makings), strict=True):
        found[side] = basis
        if len(found) == len(due.projection.low.sides(due.projection.shape)):
            due.projection.refresh_(due.state, found, step=due.step)
            found = {}


def _chunks(sides: Sequence[_Side]) -> Iterator[list[_Side]]:
    """Lists that fit REFRESH_NBYTES, or have one matrix; its sides stay together."""
    chunk: list[_Side] = []
    nbytes = 0
    for index, one in enumerate(sides):
        begins = index == 0 or sides[index - 1].due is not one.due
        own = sum(_nbytes(other) for other in sides[index : index + 2] if other.due is one.due)
        if chunk and begins and nbytes + own > REFRESH_NBYTES:
            yield chunk
            chunk, nbytes = [], 0
        chunk.append(one)
        nbytes += _nbytes(one)
    if chunk:
        yield chunk


def _nbytes(one: _Side) -> int:
    """Bytes that a basis in the making holds while others are at work: columns of the other side
    while they are squared, then those of its own side, twice, and its share of factors.
    """
    rank, (rows, columns) = one.due.projection.low.rank, one.due.projection.part.shape
    own, other = (rows, columns) if one.side == "left" else (columns, rows)
    element = one.due.matrix.element_size()
    return max(2 * own, other) * rank * element + _GRAM_BYTES * rank * rank
