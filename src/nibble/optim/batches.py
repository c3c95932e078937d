"""Batches of parameters that take a step together.

Small tensors share a batch, so that hundreds of adapters cost some dozens of launches; a large
tensor is cut into slices at whole blocks of 256, so that temporaries stay under 256 MiB. Only a
rule that is not elementwise (adafactor) needs whole tensors, and then the largest sets the bound.

A batch holds pieces of one kind only: one device, one dtype, one storage, one step, since the
multi-tensor kernels want lists of one dtype and rules one step count. Costs no device work at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nibble.optim.states import Stored
from nibble.spec.state import BLOCK, Slot

BATCH_NBYTES = 256 * 2**20
"""Bound on the temporaries of one batch."""
# Bytes of temporaries an element, at the widest moment of a step. Nothing unpacked: the update and
# its denominator. Else copies of gradient, weight and two states, and an encoder's scratch.
_PLAIN_BYTES = 8
_UNPACKED_BYTES = 48


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """A parameter or a slice of one, with its gradient and state."""

    weight: Tensor
    grad: Tensor
    stored: dict[Slot, Stored]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What all pieces of a batch have in common."""

    device: torch.device
    weight_dtype: torch.dtype
    grad_dtype: torch.dtype
    slots: tuple[Slot, ...]
    names: tuple[str, ...]
    step: int


def batches(pieces: list[Piece], *, elementwise: bool) -> Iterator[list[Piece]]:
    """Pieces of one kind in lists whose temporaries fit BATCH_NBYTES; larger ones are cut.

    A whole tensor above the bound makes a batch of its own under a rule that is not elementwise.
    """
    tensors = [tensor for stored in pieces[0].stored.values() for tensor in stored]
    plain = elementwise and all(
        tensor.dtype == torch.float32 for tensor in (pieces[0].weight, pieces[0].grad, *tensors)
    )
    limit = BATCH_NBYTES // (_PLAIN_BYTES if plain else _UNPACKED_BYTES) // BLOCK * BLOCK
    batch: list[Piece] = []
    num_elements = 0
    for piece in pieces:
        for part in _slices(piece, limit) if elementwise else (piece,):
            if batch and num_elements + part.weight.numel() > limit:
                yield batch
                batch, num_elements = [], 0
            batch.append(part)
            num_elements += part.weight.numel()
    yield batch


def _slices(piece: Piece, limit: int) -> Iterator[Piece]:
    """The piece, or slices of `limit` elements of it if it is larger and contiguous."""
    numel = piece.weight.numel()
    if numel <= limit or not (piece.weight.is_contiguous() and piece.grad.is_contiguous()):
        yield piece
        return
    weight, grad = piece.weight.view(-1), piece.grad.view(-1)
    for start in range(0, numel, limit):
        elements = slice(start, min(start + limit, numel))
        blocks = slice(start // BLOCK, -(-elements.stop // BLOCK))
        stored = {
            # (values,) or (codes, absmax): the second has one element for each block.
            slot: tuple(
                tensor.view(-1)[extent]
                for tensor, extent in zip(tensors, (elements, blocks), strict=False)
            )
            for slot, tensors in piece.stored.items()
        }
        yield Piece(weight=weight[elements], grad=grad[elements], stored=stored)
