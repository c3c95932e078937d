"""The step of projected parameters.

    R = project(G);   U = rule(R);   W <- W - lr * scale * (back(X) + f o G)

with X and f of the group's residual (numerics/lowrank.py, and balanced.py for one that is no
multiple of G). Products are those of the gradient's
type, by cuBLAS; what is left of a matrix's step is one pass over its weight, gradient and back(X),
a kernel of its own on CUDA (kernels/move.py) and a handful of passes elsewhere.

Costs: 4 m n r flops a matrix; it is taken by rows, so that temporaries stay under 256 MiB; a basis
is unpacked twice. A residual asks for the whole gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nibble.kernels.steps import step_kernels
from nibble.numerics import lowrank
from nibble.optim import batches
from nibble.optim.balanced import Rest
from nibble.optim.batches import FUSED_NUMEL, Kind
from nibble.optim.noise import Address, Noise, noise_for
from nibble.optim.projected_grad import ProjectedGrad
from nibble.optim.projection import Bases, Projection
from nibble.optim.refresh import Due, refresh_
from nibble.optim.residuals import Matrix, Residual, residuals
from nibble.optim.update import advance, move_, rate_factor

# Bytes of temporaries for each element of a small matrix (batches.py), and of a chunk of rows:
# weight, update, gradient, residual; of the update alone where a kernel does the rest.
_SMALL_BYTES = 48
_ROW_BYTES = 16
_FUSED_ROW_BYTES = 4
_STORES = 2


class Terms(NamedTuple):
    """Rows of back(X) + f o G as they are; either may be absent. `update` is in the gradient's
    type, `factor` float32 of shape [1, 1], [rows, 1] or [1, columns].
    """

    update: Tensor | None
    grad: Tensor | None
    factor: Tensor | None

    def total(self) -> Tensor:
        """The sum, float32, a tensor of its own or `update`."""
        total = None if self.update is None else self.update.float()
        if self.factor is not None and self.grad is not None:
            scaled = self.grad.float() * self.factor
            total = scaled if total is None else total + scaled
        assert total is not None
        return total


class Store(Protocol):
    """Where a parameter's values are if not in the parameter (stores.py)."""

    def move_(
        self,
        rows: slice,
        terms: Terms,
        *,
        group: dict[str, Any],
        scale: float,
        noise: Noise,
        address: Address,
    ) -> None:
        """Step some rows, rounded with noise at the addresses of their elements."""


class ProjectedPiece(NamedTuple):
    """A projected parameter with its state, and the store of its values if it has one."""

    weight: Tensor
    projection: Projection
    state: dict[str, Any]
    store: Store | None = None


def refresh_due_(pieces: Iterable[ProjectedPiece]) -> None:
    """Make the bases anew for which it is time, of pieces whose whole gradients are here."""
    due = []
    for weight, projection, state, _ in pieces:
        grad, step = weight.grad, state["step"] - 1  # counted already
        if step < state["next_refresh"] or grad is None or isinstance(grad, ProjectedGrad):
            continue
        due.append(Due(projection, state, grad.reshape(projection.matrix_shape), step))
    refresh_(due)


def projected_batches(pieces: list[ProjectedPiece]) -> Iterator[list[ProjectedPiece]]:
    """Pieces of one kind in lists whose small matrices fit batches.BATCH_NBYTES."""
    limit = batches.BATCH_NBYTES // _SMALL_BYTES
    batch: list[ProjectedPiece] = []
    num_elements = 0
    for piece in pieces:
        rows, columns = piece.projection.low.projected_shape(piece.projection.shape)
        if batch and num_elements + rows * columns > limit:
            yield batch
            batch, num_elements = [], 0
        batch.append(piece)
        num_elements += rows * columns
    if batch:
        yield batch


def step_projected_(
    batch: list[ProjectedPiece],
    *,
    group: dict[str, Any],
    kind: Kind,
    state_noise: Noise | None,
    weight_noise: Noise | None,
) -> None:
    """One step of projected parameters: the module's equation."""
    # Norms of a residual want float32; alone, back(X) multiplies in the gradient's type.
    plain = group["residual"] == "none"
    # A kernel reads it in any type; sums over parts and norms want float32.
    as_is = plain and step_kernels(kind.device.type) is not None
    grads = [_projected(piece) for piece in batch]
    if not (as_is and len({grad.dtype for grad in grads}) == 1):
        grads = [grad.float() for grad in grads]
    _sum_parts_(batch, grads)
    updates = advance(
        grads,
        [piece.state for piece in batch],
        group=group,
        kind=kind,
        noise=state_noise,
        addresses=[piece.projection.slot_address for piece in batch],
        lengths=[p.projection.part.shape[kind.dim] for p in batch if kind.dim is not None],
        dtype=kind.grad_dtype if plain else torch.float32,
    )
    if plain:
        for piece, update in zip(batch, updates, strict=True):
            whole = _whole(piece, update, None)
            _move_by_rows_(piece, whole, group=group, noise=weight_noise)
        return
    matrices = [
        Matrix(piece.projection, piece.state, _matrix(piece), grad, update)
        for piece, update, grad in zip(batch, updates, grads, strict=True)
    ]
    for index, rest in residuals(matrices):
        whole = _whole(batch[index], updates[index], rest)
        _move_by_rows_(batch[index], whole, group=group, noise=weight_noise)
        del rest, whole  # and their buffer, before another is made


def _sum_parts_(batch: list[ProjectedPiece], grads: list[Tensor]) -> None:
    """Complete the projected gradients to which every part of a parameter adds."""
    sums: dict[Callable[[Sequence[Tensor]], None], list[Tensor]] = {}
    for piece, grad in zip(batch, grads, strict=True):
        if piece.projection.sums:
            sums.setdefault(piece.projection.part.sum_, []).append(grad)
    for sum_, tensors in sums.items():
        sum_(tensors)


def _projected(piece: ProjectedPiece) -> Tensor:
    """R, or what the own part adds to it."""
    projection, state = piece.projection, piece.state
    grad = piece.weight.grad
    assert grad is not None
    if isinstance(grad, ProjectedGrad):
        return grad.small
    matrix = grad.reshape(projection.matrix_shape)
    left, right = projection.own_bases(state, dtype=matrix.dtype)
    small = lowrank.project(matrix, left=left, right=right)
    return small.float() if projection.sums else small


@dataclass(frozen=True, kw_only=True)
class _Whole:
    """back(X) + f o G, or back(X) and a rest, to be had by rows, and once where there is a rest."""

    small: Tensor | None
    bases: Bases
    factor: Tensor | None
    matrix: Tensor | None
    rest: Rest | None = None

    def rows(self, rows: slice) -> Terms:
        """Some rows of both."""
        update = None
        if self.small is not None:
            left, right = self.bases
            own = self.small if left is not None else self.small[rows]
            some = None if left is None else left[rows]
            if self.rest is None:
                update = lowrank.project_back(own, left=some, right=right)
            else:
                update = self.rest.scaled_(rows)
                lowrank.add_back(update, own, left=some, right=right, out=update)
        if self.factor is None:
            return Terms(update=update, grad=None, factor=None)
        assert self.matrix is not None
        factor = self.factor[rows] if self.factor.shape[0] > 1 else self.factor
        return Terms(update=update, grad=self.matrix[rows], factor=factor)


def _whole(piece: ProjectedPiece, update: Tensor, rest: Residual | None) -> _Whole:
    """X and f of a piece, for update U and what its residual adds."""
    grad = piece.weight.grad
    assert grad is not None
    small = update.to(grad.dtype) if rest is None else rest.small
    bases: Bases = (None, None)
    if small is not None:
        bases = piece.projection.own_bases(piece.state, dtype=grad.dtype)
    if rest is None:
        return _Whole(small=small, bases=bases, factor=None, matrix=None)
    return _Whole(
        small=small, bases=bases, factor=rest.factor, matrix=_matrix(piece), rest=rest.rest
    )


def _matrix(piece: ProjectedPiece) -> Tensor:
    """The gradient as a matrix."""
    grad = piece.weight.grad
    assert grad is not None and not isinstance(grad, ProjectedGrad), "a residual needs the whole"
    return grad.reshape(piece.projection.matrix_shape)


def _chunks(whole: _Whole, num_rows: int, *, element_bytes: int) -> Iterator[slice]:
    """Slices of rows whose temporaries fit batches.BATCH_NBYTES."""
    if whole.matrix is not None:
        num_columns = whole.matrix.shape[1]
    else:
        assert whole.small is not None
        right = whole.bases[1]
        num_columns = whole.small.shape[1] if right is None else right.shape[0]
    size = max(1, batches.BATCH_NBYTES // element_bytes // max(1, num_columns))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _move_by_rows_(
    piece: ProjectedPiece, whole: _Whole, *, group: dict[str, Any], noise: Noise | None
) -> None:
    """Apply an update to its weight, some rows at a time."""
    weight, projection = piece.weight, piece.projection
    shape, scale, address = projection.matrix_shape, projection.low.scale, projection.address()
    fused = step_kernels(weight.device.type) is not None
    element_bytes = _FUSED_ROW_BYTES if fused else _ROW_BYTES
    if piece.store is not None:
        own = noise_for(group["seed"], projection.index, piece.state["step"], _STORES)
        for rows in _chunks(whole, shape[0], element_bytes=element_bytes):
            piece.store.move_(
                rows,
                whole.rows(rows),
                group=group,
                scale=scale,
                noise=own,
                address=address.at(rows.start * shape[1]),
            )
        return
    floor = group["parameter_scale"]
    share = rate_factor(weight, floor=floor, view=projection.view) if floor > 0 else None
    rows_of = weight if weight.dim() == 2 else weight.reshape(shape)
    for rows in _chunks(whole, shape[0], element_bytes=element_bytes):
        _move_rows_(
            rows_of[rows],
            whole.rows(rows),
            group=group,
            scale=scale,
            noise=noise,
            address=address.at(rows.start * shape[1]),
            share=share,
        )
    if rows_of.data_ptr() != weight.data_ptr():  # a kernel in channels-last order was copied
        weight.copy_(rows_of.view(weight.shape))


def _move_rows_(
    target: Tensor,
    terms: Terms,
    *,
    group: dict[str, Any],
    scale: float,
    noise: Noise | None,
    address: Address,
    share: Tensor | None,
) -> None:
    """W <- (1 - decay) W - rate (back(X) + f o G) of some rows."""
    kernels = step_kernels(target.device.type)
    if kernels is None or target.numel() < FUSED_NUMEL or not target.is_contiguous():
        move_(
            [target],
            [terms.total()],
            group=group,
            noise=noise,
            addresses=[address],
            scale=scale,
            factors=None if share is None else [share],
        )
        return
    rate = float(group["lr"])
    kernels.move_(
        target,
        None if terms.update is None else terms.update.contiguous(),
        rate=rate * scale,
        decay=rate * group["weight_decay"],
        decay_last=group["decay_last"],
        key=None if noise is None else noise.key,
        place=address.place,
        grad=None if terms.grad is None else terms.grad.contiguous(),
        factor=terms.factor,
        share=share,
    )
