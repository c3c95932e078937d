"""A part of a matrix, and the products that bases are made of.

A matrix G [m, n] in parts of its rows G_i (axis 0) or columns (axis 1), and columns S [., r]:

    G^T S = sum_i G_i^T S_i     rows: a sum over the parts of small matrices [n, r]
    G S   = (G_i S, one below another)      the same with zeros in the other parts' rows, summed

and the other way round for columns. So every process gets the same bits of [m, r] and [n, r], from
which it makes the same basis; the matrix itself never travels (but for an SVD, which needs it).

Projecting is local along the side that is not projected: R_i = G_i Q has the rows of G_i, and
P^T G is a sum over rows. Costs nothing for a matrix that is not split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nibble.errors import ConfigError
from nibble.numerics import lowrank
from nibble.optim.shards import ShardView
from nibble.spec.lowrank import matrix_shape
from nibble.spec.state import Slot

SIDES = ("left", "right")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows (axis 0) or columns (axis 1) of a matrix of `shape`; axis None: all of it."""

    shape: tuple[int, int]
    axis: int | None
    start: int
    length: int
    sum_: Callable[[Sequence[Tensor]], None]

    @property
    def own_shape(self) -> tuple[int, int]:
        """Rows and columns of what lives here."""
        rows, columns = self.shape
        if self.axis is None:
            return self.shape
        return (self.length, columns) if self.axis == 0 else (rows, self.length)

    def cuts(self, side: str) -> bool:
        """Whether the side that a basis stands on is the one that is cut."""
        return self.axis is not None and SIDES[self.axis] == side

    def of(self, columns: Tensor, side: str) -> Tensor:
        """The rows of a matrix [m, r] (left) or [n, r] (right) that meet the own part."""
        return columns.narrow(0, self.start, self.length) if self.cuts(side) else columns

    def product(self, own: Tensor, columns: Tensor, side: str) -> Tensor:
        """G S (left) or G^T S (right) of the whole matrix, float32, equal on all processes."""
        other = SIDES[side == "left"]
        made = lowrank.sketch(own, columns=self.of(columns, other), side=side)
        if self.axis is None:
            return made
        if self.cuts(side):
            return self._placed(made, 0, self.shape[self.axis])
        self.sum_([made])
        return made

    def whole(self, own: Tensor) -> Tensor:
        """All of the matrix: the one thing here that makes as much travel as it has elements."""
        return own if self.axis is None else self._placed(own, self.axis, self.shape[self.axis])

    def _placed(self, own: Tensor, axis: int, size: int) -> Tensor:
        shape = list(own.shape)
        shape[axis] = size
        found = own.new_zeros(shape)
        found.narrow(axis, self.start, self.length).copy_(own)
        self.sum_([found])
        return found


def part_of(view: ShardView, own_shape: tuple[int, ...]) -> Part:
    """The part of the matrix that a parameter of two dims or more is taken as.

    Raises ConfigError for a cut that leaves neither rows nor columns of it.
    """
    shape = matrix_shape(view.shape)
    axis, start, length = None, 0, 0
    if view.dim is not None:
        inner = view.shape[1] if len(view.shape) == 3 else 1
        if view.dim == 0:
            axis, start, length = 0, view.start * inner, own_shape[0] * inner
        elif view.dim == len(view.shape) - 1 and len(view.shape) <= 3:
            axis, start, length = 1, view.start, own_shape[-1]
        else:
            raise ConfigError(
                f"a projected tensor of shape {list(view.shape)} is split along dim {view.dim}, "
                "which is neither rows nor columns of its matrix: split it along dim 0"
            )
    return Part(shape=shape, axis=axis, start=start, length=length, sum_=view.sum_)


def slot_dim(slot: Slot, dim: int | None, num_dims: int) -> int | None:
    """The dim along which a slot is cut, for what the rule sees (num_dims) cut along `dim`."""
    if dim is None or num_dims < 2 or slot.extent == "full":
        return dim
    skipped = num_dims - (1 if slot.extent == "rows" else 2)
    return None if dim == skipped else dim - (dim > skipped)


def check_views(views: dict[Tensor, ShardView], groups: list[dict[str, Any]]) -> None:
    """Raise ConfigError for a view of a tensor that no group has, or that its part does not fit."""
    known = {id(weight) for group in groups for weight in group["params"]}
    for weight, view in views.items():
        if id(weight) not in known:
            raise ConfigError(
                f"a shard view of shape {list(view.shape)} is of no parameter of this optimiser: "
                "give views of what it steps"
            )
