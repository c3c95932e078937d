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

The step itself is in projected_step.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from nibble.numerics import lowrank
from nibble.optim.noise import Address, address_of, generator_for
from nibble.optim.parts import Part, part_of, slot_dim
from nibble.optim.shards import ShardView
from nibble.optim.shards import whole as whole_view
from nibble.optim.states import DTYPES
from nibble.spec.lowrank import (
    LAZY_FACTOR,
    LAZY_QUEUE,
    LowRank,
    low_rank_of,
)
from nibble.spec.state import Slot

Bases = tuple[Tensor | None, Tensor | None]
"""Left and right basis; None where a side is not projected."""


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
    base: int
    """The number of the parameter's first element in its group (noise.py)."""

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

    def address(self) -> Address:
        """Which numbers the elements of the parameter's part have."""
        view = self.view
        own = tuple(self.weight.shape)
        return address_of(own, whole=view.shape, dim=view.dim, start=view.start, base=self.base)

    def slot_address(self, slot: Slot) -> Address:
        """Which numbers the elements of a slot of the rule have."""
        whole, own = self.low.projected_shape(self.shape), self.small_shape
        return address_of(
            slot.shape(own),
            whole=slot.shape(whole),
            dim=slot_dim(slot, self.small_axis, 2),
            start=self.part.start,
            base=self.base,
        )

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
        (basis,) = lowrank.together([self._making(matrix, side, generator)])
        return basis

    def making(self, state: Mapping[str, Any], matrix: Tensor, side: str) -> lowrank.Making:
        """A randomised basis that the gradient `matrix` gives, to be finished with others."""
        return self._making(matrix, side, self.generator(state["num_refreshes"], side))

    def _making(self, matrix: Tensor, side: str, generator: torch.Generator) -> lowrank.Making:
        return lowrank.randomised_basis(
            lambda columns, of: self.part.product(matrix, columns, of),
            length=self.part.shape[1 if side == "left" else 0],
            rank=self.low.rank,
            side=side,
            generator=generator,
            coarse=matrix.dtype != torch.float32,
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
    bases = list(accumulate((prod(view_of(w).shape) for w in group["params"]), initial=0))
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
            base=bases[position],
        )
        for number, (position, weight, view) in enumerate(places)
    }
