"""Batches of parameters that take a step together.

Small tensors share a batch, so that hundreds of adapters cost some dozens of launches; a large
tensor is cut into slices at whole blocks of 256, so that temporaries stay under 256 MiB. A rule
that is not elementwise (adafactor) gets whole tensors; of large ones it takes some rows at a time
(by_rows.py).

A batch holds pieces of one kind only: one device, one dtype, one storage, one step, since the
multi-tensor kernels want lists of one dtype and rules one step count. Costs no device work at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nibble.optim.noise import Address, address_of
from nibble.optim.parts import slot_dim
from nibble.optim.shards import ShardView
from nibble.spec.state import BLOCK, Slot

BATCH_NBYTES = 256 * 2**20
"""Bound on the temporaries of one batch."""
# Bytes of temporaries an element, at the widest moment of a step. Nothing unpacked: the update and
# its denominator. Else copies of gradient, weight and two states, and an encoder's scratch.
_PLAIN_BYTES = 8
_UNPACKED_BYTES = 48
# A kernel that takes a tensor's whole step leaves the update.
_FUSED_BYTES = 8
FUSED_NUMEL = 1 << 20
"""From here on a launch is short beside its work: the kernel takes a tensor alone."""


class Piece(NamedTuple):
    """A parameter or a slice of one, with its gradient and its state by name."""

    weight: Tensor
    grad: Tensor
    state: dict[str, Any]
    base: int
    """The number of the whole parameter's first element in its group (noise.py)."""
    shape: tuple[int, ...]
    """Of what lives here of the parameter, of which this may be a slice in a line."""
    view: ShardView
    start: int = 0
    """Where the slice begins."""
    looks_around: bool = False
    """Whether the rule looks beyond single elements."""

    @property
    def numel(self) -> int:
        """Elements of the whole tensor if sums go over parts: all processes cut batches alike."""
        return prod(self.view.shape) if self.looks_around else self.weight.numel()

    def address(self) -> Address:
        """Which numbers the weight's elements have."""
        view = self.view
        own = address_of(
            self.shape, whole=view.shape, dim=view.dim, start=view.start, base=self.base
        )
        return own.at(self.start)

    def slot_address(self, slot: Slot) -> Address:
        """Which numbers the elements of a slot have."""
        if slot.extent == "full":
            return self.address()
        view = self.view
        dim = slot_dim(slot, view.dim, len(view.shape))
        own, whole = slot.shape(self.shape), slot.shape(view.shape)
        return address_of(own, whole=whole, dim=dim, start=view.start, base=self.base)


class Kind(NamedTuple):
    """What all pieces of a batch have in common; `names` are the keys of their states.

    Where a rule looks beyond single elements and what it sees is cut, `dim` (from the end) says
    along which dim, and `sum_` adds over the parts.
    Made for each parameter in each step, hence a plain tuple.
    """

    device: torch.device
    weight_dtype: torch.dtype
    grad_dtype: torch.dtype
    slots: tuple[Slot, ...]
    names: tuple[str, ...]
    step: int
    dim: int | None = None
    sum_: Callable[[Sequence[Tensor]], None] | None = None

    def stored_names(self, slot: Slot) -> tuple[str, ...]:
        """Names under which a slot's tensors are in the state."""
        codes, absmax = f"{slot.name}_codes", f"{slot.name}_absmax"
        return (codes, absmax) if codes in self.names else (slot.name,)


def batches(
    pieces: list[Piece], *, elementwise: bool, fused: bool = False
) -> Iterator[list[Piece]]:
    """Pieces of one kind in lists whose temporaries fit BATCH_NBYTES; larger ones are cut.

    A whole tensor above the bound makes a batch of its own under a rule that is not elementwise.
    `fused`: a kernel takes large slices, so that there may be fewer of them.
    """
    tensors = [value for value in pieces[0].state.values() if isinstance(value, Tensor)]
    plain = elementwise and all(
        tensor.dtype == torch.float32 for tensor in (pieces[0].weight, pieces[0].grad, *tensors)
    )
    limit = BATCH_NBYTES // (_PLAIN_BYTES if plain else _UNPACKED_BYTES) // BLOCK * BLOCK
    longest = BATCH_NBYTES // _FUSED_BYTES // BLOCK * BLOCK if fused else limit
    batch: list[Piece] = []
    num_elements = 0
    # What a kernel takes alone comes last: vectors between matrices would each be a batch of one.
    ordered = sorted(pieces, key=lambda piece: piece.numel >= FUSED_NUMEL) if fused else pieces
    for piece in ordered:
        for part in _slices(piece, longest) if elementwise else (piece,):
            if batch and num_elements + part.numel > limit:
                yield batch
                batch, num_elements = [], 0
            batch.append(part)
            num_elements += part.numel
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
        state = {
            name: value.view(-1)[elements if value.numel() == numel else blocks]
            for name, value in piece.state.items()
            if isinstance(value, Tensor)
        }
        yield piece._replace(
            weight=weight[elements],
            grad=grad[elements],
            state=state,
            start=start,
        )
