"""A step of Adafactor on one large matrix, or stack of matrices, some rows at a time.

Its update of an element hangs on sums over rows and columns and on the update's own norm, so a
whole tensor would need float32 copies of itself: nine bytes an element, 4.7 GB for the table of an
8B. The sums are added up over slices of rows instead, and the update is then made slice by slice
from its factors (numerics/updates.py), which reads gradients three times; so only tensors go this
way whose copies are large. What lives here may be a part of the tensor: the same sums travel in the
same order as for whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nibble.numerics.updates import (
    Factors,
    Rows,
    Split,
    adafactor_divisor,
    adafactor_factors_,
)
from nibble.optim.batches import BATCH_NBYTES, Kind, Piece
from nibble.optim.noise import Noise
from nibble.optim.states import unpack, write_back_
from nibble.optim.update import advance_slice, hyper_of, move_
from nibble.spec.state import BLOCK

WHOLE_NBYTES = 2 * BATCH_NBYTES
"""Bound on the temporaries of a tensor that is taken whole."""
_WHOLE_BYTES = 9
"""Of these an element."""
_ROWS_BYTES, _MOMENTUM_BYTES = 12, 12
"""Of some rows an element: gradient, update and weight in float32; momentum and its encoder's
scratch."""


class Cut(NamedTuple):
    """Rows `start` to `stop` of matrix number `matrix` of a stack [k, m, n]."""

    matrix: int
    start: int
    stop: int


def goes_by_rows(batch: list[Piece], *, rule: str) -> bool:
    """Whether this batch is one tensor that is stepped here."""
    piece = batch[0]
    if not rule.startswith("adafactor") or len(batch) > 1 or len(piece.shape) not in (2, 3):
        return False
    lines_up = len(piece.shape) == 2 or prod(piece.shape[-2:]) % BLOCK == 0
    is_flat = piece.weight.is_contiguous() and piece.grad.is_contiguous()
    is_large = prod(piece.view.shape) * _WHOLE_BYTES > WHOLE_NBYTES
    return is_large and lines_up and is_flat


def step_by_rows_(
    piece: Piece,
    *,
    group: dict[str, Any],
    kind: Kind,
    state_noise: Noise | None,
    weight_noise: Noise | None,
    factor: Tensor | None,
) -> None:
    """Advance the state of a piece and move its weight; `factor` multiplies the learning rate."""
    whole = [slot for slot in kind.slots if slot.extent == "full"]
    cuts = list(_cuts(piece.shape, _ROWS_BYTES + (_MOMENTUM_BYTES if whole else 0)))
    factors = _clipped(piece, cuts, group=group, kind=kind, noise=state_noise)
    num_rows, num_columns = piece.shape[-2:]
    for cut in cuts:
        first = (cut.matrix * num_rows + cut.start) * num_columns
        elements = slice(first, first + (cut.stop - cut.start) * num_columns)
        blocks = slice(first // BLOCK, -(-elements.stop // BLOCK))
        state = {
            name: value.view(-1)[elements if value.numel() == piece.weight.numel() else blocks]
            for slot in whole
            for name in kind.stored_names(slot)
            for value in (piece.state[name],)
        }
        part = piece._replace(weight=piece.weight.view(-1)[elements], state=state, start=first)
        update = factors.update(_rows(piece, cut)).view(-1)
        update = advance_slice(
            update, state, group=group, kind=kind, noise=state_noise, address=part.slot_address
        )
        move_(
            [part.weight],
            [update],
            group=group,
            noise=weight_noise,
            addresses=[part.address()] if weight_noise is not None else (),
            factors=None if factor is None else [factor],
        )


def _clipped(
    piece: Piece, cuts: list[Cut], *, group: dict[str, Any], kind: Kind, noise: Noise | None
) -> Factors:
    """Factors whose update is clipped already; states of rows and columns advance."""
    slots = [slot for slot in kind.slots if slot.extent != "full"]
    stored = {
        slot: [tuple(piece.state[name] for name in kind.stored_names(slot))] for slot in slots
    }
    values = {slot: unpack(tensors, slot=slot) for slot, tensors in stored.items()}
    split, length, shape = None, 0, (1, *piece.shape)
    if kind.dim is not None and kind.sum_ is not None:
        length = piece.view.shape[kind.dim]
        split = Split(dim=kind.dim, lengths=[length], sum_=kind.sum_)
    factors = adafactor_factors_(
        lambda: (_rows(piece, cut) for cut in cuts),
        shape=shape,
        states={slot.name: own.views for slot, own in values.items()},
        hyper=hyper_of(group, kind),
        split=split,
        length=length,
    )
    for number, slot in enumerate(kind.slots):
        if slot in values:
            write_back_(
                stored[slot],
                values=values[slot],
                slot=slot,
                noise=None if noise is None else noise.of(number),
                addresses=[piece.slot_address(slot)],
            )
    squares = torch.zeros(1, device=piece.grad.device)
    for cut in cuts:
        squares += torch.linalg.vector_norm(factors.update(_rows(piece, cut))).square_()
    divisor = adafactor_divisor(squares, shape=shape, split=split, length=length)
    return factors._replace(rows=factors.rows / divisor)


def _rows(piece: Piece, cut: Cut) -> Rows:
    """Some rows of the gradient as [1, rows, n] or [1, 1, rows, n]."""
    rows = slice(cut.start, cut.stop)
    if len(piece.shape) == 2:
        some = piece.grad[rows].float().unsqueeze(0)
        return Rows(some, (slice(None), rows), (slice(None),))
    matrix = slice(cut.matrix, cut.matrix + 1)
    some = piece.grad[matrix, rows].float().unsqueeze(0)
    return Rows(some, (slice(None), matrix, rows), (slice(None), matrix))


def _cuts(shape: tuple[int, ...], element_bytes: int) -> Iterator[Cut]:
    """All rows in slices whose temporaries fit BATCH_NBYTES, cut at whole blocks of the state."""
    num_rows, num_columns = shape[-2:]
    aligned = BLOCK // gcd(BLOCK, num_columns)
    most = BATCH_NBYTES // (element_bytes * max(1, num_columns)) // aligned * aligned
    for matrix in range(prod(shape[:-2])):
        for start in range(0, num_rows, max(most, aligned)):
            yield Cut(matrix, start, min(start + max(most, aligned), num_rows))
