"""Projected parameters: what is kept for one, when its basis is made anew, and its step.

    R = project(G);   U = rule(R);   W <- W - lr * scale * (back(X) + f o G)

with X and f of the group's residual (numerics/lowrank.py). The gradient that is due for a refresh
gives the next basis, from that step on, as in GaLore (arXiv 2403.03507); moments stay as they are.
With `stagger` the k-th of K matrices is refreshed (k + 1) / K of a gap after whole gaps, so that
refreshes come one by one. The lazy rule (arXiv 2407.08296) doubles the gap of a matrix whose last
bases were alike; it reads one number from the device, once a refresh.

State beside the rule's: bases as they are packed, the last residual's norm, similarities, and four
ints: `step`, `next_refresh` (the step, counted from 0, that begins with a new basis), `gap`,
`num_refreshes`. Random numbers are functions of (seed, group, position, num_refreshes).

Costs: a matrix's update is made by rows, so that temporaries stay under 256 MiB; a basis is
unpacked twice a step. A residual asks for the whole gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nibble.numerics import lowrank
from nibble.optim import batches
from nibble.optim.batches import Kind
from nibble.optim.noise import generator_for
from nibble.optim.parts import Part, part_of
from nibble.optim.projected_grad import ProjectedGrad
from nibble.optim.shards import ShardView
from nibble.optim.shards import whole as whole_view
from nibble.optim.states import DTYPES
from nibble.optim.update import advance, move_, rate_factor, rounds_weights
from nibble.spec.lowrank import (
    LAZY_FACTOR,
    LAZY_QUEUE,
    LowRank,
    low_rank_of,
)

Bases = tuple[Tensor | None, Tensor | None]
"""Left and right basis; None where a side is not projected."""
# Bytes of temporaries for each element of a small matrix (batches.py), and of a chunk of rows:
# weight, update, gradient, residual.
_SMALL_BYTES = 48
_ROW_BYTES = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """How one parameter is projected, and the numbers that its random streams hang on."""

    low: LowRank
    weight: Tensor
    view: ShardView
    part: Part
    seed: int
    index: int
    position: int
    first_gap: int

    @property
    def device(self) -> torch.device:
        """Where the parameter is now: a model may move after its optimiser was made."""
        return self.weight.device

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self.view.shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of what lives here of the parameter as a matrix."""
        return self.part.own_shape

    @property
    def sums(self) -> bool:
        """Whether the projected gradient is a sum over the parts of the parameter."""
        return any(self.part.cuts(side) for side in self.low.sides(self.shape))

    @property
    def small_axis(self) -> int | None:
        """Along which axis the projected gradient is cut; None: the same everywhere."""
        return None if self.sums else self.part.axis

    @property
    def small_shape(self) -> tuple[int, int]:
        """Shape of what lives here of the projected gradient."""
        return small_shape(self.low, self.part, self.shape)

    def initialise_(self, state: dict[str, Any]) -> None:
        """Add zeros for all tensors of the projection, and its counters; no basis yet."""
        for name, spec in self.low.tensors(self.shape).items():
            state[name] = torch.zeros(spec.shape, dtype=DTYPES[spec.dtype], device=self.device)
        state.update(next_refresh=0, gap=self.low.update_proj_gap, num_refreshes=0)

    def generator(self, number: int, side: str, *, purpose: int = 0) -> torch.Generator:
        """The stream of random numbers for basis `number` on one side."""
        which = ("left", "right").index(side) + 2 * purpose
        return generator_for(
            self.seed, self.index, self.position, number, which, device=self.device
        )

    def bases(self, state: Mapping[str, Any], *, dtype: torch.dtype) -> Bases:
        """The present bases in `dtype`, whole."""
        return (self._basis(state, "left", dtype), self._basis(state, "right", dtype))

    def own_bases(self, state: Mapping[str, Any], *, dtype: torch.dtype) -> Bases:
        """The rows of the present bases that meet the own part of the parameter."""
        left, right = self.bases(state, dtype=dtype)
        return (
            None if left is None else self.part.of(left, "left"),
            None if right is None else self.part.of(right, "right"),
        )

    def _basis(self, state: Mapping[str, Any], side: str, dtype: torch.dtype) -> Tensor | None:
        if side not in self.low.sides(self.shape):
            return None
        shape = self.low.basis_shape(self.shape, side)
        if self.low.basis == "seeded":
            generator = self.generator(state["num_refreshes"], side)
            columns = lowrank.gaussian_projection(shape[0], rank=shape[1], generator=generator)
            return columns.to(dtype)
        names = self._names(side)
        return lowrank.unpack_basis(
            tuple(state[name] for name in names),
            storage=self.low.basis_storage,
            shape=shape,
            dtype=dtype,
        )

    def _names(self, side: str) -> tuple[str, ...]:
        packed = self.low.basis_storage in ("int8", "int4")
        name = f"basis_{side}"
        return (f"{name}_codes", f"{name}_scales") if packed else (name,)

    def new_bases(self, state: Mapping[str, Any], matrix: Tensor) -> dict[str, Tensor]:
        """Bases by side, float32, that the gradient `matrix` gives; none for a seeded one."""
        if self.low.basis == "seeded":
            return {}
        if self.low.basis == "random":
            return self.random_bases(state)
        return {
            side: self._made(matrix, side, self.generator(state["num_refreshes"], side))
            for side in self.low.sides(self.shape)
        }

    def random_bases(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Orthonormal bases by side, float32, that no gradient has a say in."""
        made = {}
        for side in self.low.sides(self.shape):
            dim, rank = self.low.basis_shape(self.shape, side)
            generator = self.generator(state["num_refreshes"], side)
            made[side] = lowrank.random_basis(dim, rank=rank, generator=generator)
        return made

    def _made(self, matrix: Tensor, side: str, generator: torch.Generator) -> Tensor:
        rank = self.low.rank
        # A longer side has no more than min(m, n) singular vectors; every projected matrix has
        # that many or more than its rank.
        if self.low.basis == "svd":
            try:
                return lowrank.svd_basis(self.part.whole(matrix), rank=rank, side=side)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                pass  # it did not converge: a sketch always does
        return lowrank.randomised_basis(
            lambda columns, of: self.part.product(matrix, columns, of),
            length=self.part.shape[1 if side == "left" else 0],
            rank=rank,
            side=side,
            generator=generator,
        )

    def refresh_(self, state: dict[str, Any], bases: Mapping[str, Tensor], *, step: int) -> None:
        """Keep new bases, which are in use from `step` (counted from 0) on; set the next date."""
        if self.low.lazy_threshold > 0 and state["num_refreshes"] > 0:
            self._look_back_(state, bases)
        for side, basis in bases.items():
            packed = lowrank.pack_basis(basis, storage=self.low.basis_storage)
            for name, tensor in zip(self._names(side), packed, strict=True):
                state[name].copy_(tensor)
        state["num_refreshes"] += 1
        # The next of the matrix's dates, first_gap + k gaps, that is half a gap away or more.
        soonest = step + max(1, state["gap"] // 2)
        state["next_refresh"] = soonest + (self.first_gap - soonest) % state["gap"]

    def _look_back_(self, state: dict[str, Any], bases: Mapping[str, Tensor]) -> None:
        """Note how alike old and new bases are; double the gap if they have been, for long."""
        old = dict(zip(("left", "right"), self.bases(state, dtype=torch.float32), strict=True))
        alike = [
            lowrank.subspace_similarity(before, basis)
            for side, basis in bases.items()
            if (before := old[side]) is not None
        ]
        number = state["num_refreshes"]
        state["similarities"][(number - 1) % LAZY_QUEUE] = torch.stack(alike).mean()
        if number >= LAZY_QUEUE and state["similarities"].mean() >= self.low.lazy_threshold:
            state["gap"] *= LAZY_FACTOR
            # A longer gap has to earn its doubling with a queue of its own.
            state["similarities"].zero_()


def small_shape(low: LowRank, part: Part, shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of what lives here of the projected gradient of a parameter of whole `shape`."""
    rows, columns = low.projected_shape(shape)
    if part.axis is None or any(part.cuts(side) for side in low.sides(shape)):
        return (rows, columns)
    return (part.length, columns) if part.axis == 0 else (rows, part.length)


def projections(
    index: int, group: dict[str, Any], view_of: Callable[[Tensor], ShardView] = whole_view
) -> dict[Tensor, Projection]:
    """The projected parameters of a group; `index` is the group's place in the optimiser."""
    low = low_rank_of(group)
    if low is None:
        return {}
    places = [
        (position, weight, view)
        for position, weight in enumerate(group["params"])
        if low.projects((view := view_of(weight)).shape)
    ]
    gap = low.update_proj_gap
    return {
        weight: Projection(
            low=low,
            weight=weight,
            view=view,
            part=part_of(view, tuple(weight.shape)),
            seed=group["seed"],
            index=index,
            position=position,
            first_gap=max(1, (number + 1) * gap // len(places)) if low.stagger else gap,
        )
        for number, (position, weight, view) in enumerate(places)
    }


class Store(Protocol):
    """Where a parameter's values are if not in the parameter (stores.py)."""

    def read(self, rows: slice) -> Tensor:
        """Some rows in float32, a copy."""

    def write_(self, rows: slice, values: Tensor, *, generator: torch.Generator) -> None:
        """Keep some rows, rounded with the generator's noise."""


class ProjectedPiece(NamedTuple):
    """A projected parameter with its state, and the store of its values if it has one."""

    weight: Tensor
    projection: Projection
    state: dict[str, Any]
    store: Store | None = None


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
    generator: torch.Generator | None,
) -> None:
    """One step of projected parameters: the module's equation."""
    grads = [_projected(piece) for piece in batch]
    _sum_parts_(batch, grads)
    updates = advance(
        grads,
        [piece.state for piece in batch],
        group=group,
        kind=kind,
        generator=generator,
        lengths=[p.projection.part.shape[kind.dim] for p in batch if kind.dim is not None],
    )
    noise = generator if rounds_weights(group, kind) else None
    for piece, update, grad in zip(batch, updates, grads, strict=True):
        whole = _whole_update(piece, update, grad)
        _move_by_rows_(piece, whole, group=group, noise=noise)


def _sum_parts_(batch: list[ProjectedPiece], grads: list[Tensor]) -> None:
    """Complete the projected gradients to which every part of a parameter adds."""
    sums: dict[Callable[[Sequence[Tensor]], None], list[Tensor]] = {}
    for piece, grad in zip(batch, grads, strict=True):
        if piece.projection.sums:
            sums.setdefault(piece.projection.part.sum_, []).append(grad)
    for sum_, tensors in sums.items():
        sum_(tensors)


def _projected(piece: ProjectedPiece) -> Tensor:
    """R, float32, or what the own part adds to it; the basis is made anew first if it is time."""
    projection, state = piece.projection, piece.state
    grad = piece.weight.grad
    assert grad is not None
    if isinstance(grad, ProjectedGrad):
        return grad.small.float()
    matrix = grad.reshape(projection.matrix_shape)
    step = state["step"] - 1  # counted already
    if step >= state["next_refresh"]:
        projection.refresh_(state, projection.new_bases(state, matrix), step=step)
    left, right = projection.own_bases(state, dtype=matrix.dtype)
    return lowrank.project(matrix, left=left, right=right)


@dataclass(frozen=True, kw_only=True)
class _Whole:
    """back(X) + f o G, to be had by rows."""

    small: Tensor | None
    bases: Bases
    factor: Tensor | None
    matrix: Tensor | None

    def rows(self, rows: slice) -> Tensor:
        """Rows of the sum, float32."""
        total: Tensor | None = None
        if self.small is not None:
            left, right = self.bases
            if left is None:
                part = lowrank.project_back(self.small[rows], left=None, right=right)
            else:
                part = lowrank.project_back(self.small, left=left[rows], right=right)
            total = part.float()
        if self.factor is not None:
            assert self.matrix is not None
            by_row = self.factor.shape[0] > 1
            scaled = self.matrix[rows].float() * (self.factor[rows] if by_row else self.factor)
            total = scaled if total is None else total + scaled
        assert total is not None
        return total

    def norm(self, num_rows: int) -> Tensor:
        """Norm of the whole sum, never held as one."""
        parts = [torch.linalg.vector_norm(self.rows(rows)) for rows in _chunks(self, num_rows)]
        if not parts and self.matrix is not None:
            return torch.zeros((), device=self.matrix.device)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(parts))
        return norm


def _whole_update(piece: ProjectedPiece, update: Tensor, small_grad: Tensor) -> _Whole:
    """X and f of the piece's residual, for update U and projected gradient R, both float32."""
    low, state = piece.projection.low, piece.state
    grad = piece.weight.grad
    assert grad is not None
    bases: Bases = (None, None)
    if low.residual in ("none", "fira"):
        bases = piece.projection.own_bases(state, dtype=grad.dtype)
    if low.residual == "none":
        return _Whole(small=update.to(grad.dtype), bases=bases, factor=None, matrix=None)
    assert not isinstance(grad, ProjectedGrad), "a residual needs the whole gradient"
    matrix = grad.reshape(piece.projection.matrix_shape)
    if low.residual == "tensor":
        cut = piece.projection.small_axis is not None
        sum_ = piece.projection.part.sum_ if cut else None
        factor = lowrank.tensor_ratio(update, small_grad, sum_=sum_).view(1, 1)
    else:
        dim = 0 if low.sides(piece.projection.shape) == ("left",) else 1
        factor = lowrank.channel_ratios(update, small_grad, dim=dim)
    rest = None
    if low.residual == "fira":
        rest = factor * small_grad
    if low.keeps_norm:
        negative = None if rest is None else (-rest).to(grad.dtype)
        unlimited = _Whole(small=negative, bases=bases, factor=factor, matrix=matrix)
        norm = unlimited.norm(matrix.shape[0])
        if piece.projection.part.axis is not None:
            square = norm.square()
            piece.projection.part.sum_([square])
            norm = square.sqrt()
        previous = state["residual_norm"]
        limit = lowrank.growth_factor(norm, previous, norm_growth=low.norm_growth)
        previous.copy_(norm * limit)
        factor = factor * limit
        rest = None if rest is None else rest * limit
    small = None if rest is None else (update - rest).to(grad.dtype)
    return _Whole(small=small, bases=bases, factor=factor, matrix=matrix)


def _chunks(whole: _Whole, num_rows: int) -> Iterator[slice]:
    """Slices of rows whose temporaries fit batches.BATCH_NBYTES."""
    if whole.matrix is not None:
        num_columns = whole.matrix.shape[1]
    else:
        assert whole.small is not None
        right = whole.bases[1]
        num_columns = whole.small.shape[1] if right is None else right.shape[0]
    size = max(1, batches.BATCH_NBYTES // _ROW_BYTES // max(1, num_columns))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _move_by_rows_(
    piece: ProjectedPiece, whole: _Whole, *, group: dict[str, Any], noise: torch.Generator | None
) -> None:
    """Apply an update to its weight, some rows at a time."""
    weight, shape = piece.weight, piece.projection.matrix_shape
    scale = piece.projection.low.scale
    if piece.store is not None:
        generator = piece.projection.generator(piece.state["step"], "left", purpose=2)
        for rows in _chunks(whole, shape[0]):
            values = piece.store.read(rows)
            move_([values], [whole.rows(rows)], group=group, noise=None, scale=scale)
            piece.store.write_(rows, values, generator=generator)
        return
    floor = group["parameter_scale"]
    view = piece.projection.view
    factors = [rate_factor(weight, floor=floor, view=view)] if floor > 0 else None
    rows_of = weight if weight.dim() == 2 else weight.reshape(shape)
    for rows in _chunks(whole, shape[0]):
        update = [whole.rows(rows)]
        move_([rows_of[rows]], update, group=group, noise=noise, scale=scale, factors=factors)
    if rows_of.data_ptr() != weight.data_ptr():  # a kernel in channels-last order was copied
        weight.copy_(rows_of.view(weight.shape))
