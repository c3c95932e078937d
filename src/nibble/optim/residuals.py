"""What a residual adds of the gradient outside of the basis: X and f of projected_step's equation.

    fira      W <- W - lr (scale back(U) + c phi o (G - scale back(R)))      (numerics/lowrank.py)
    channel   W <- W - lr scale c phi o G
    tensor    the same, phi one number
    balanced  W <- W - lr (scale back(U) + 2 rms(U) a o (G - back(R)) o b)   (balanced.py)

c needs the norm of what it limits. With an orthonormal basis that takes no product: of a channel j

    |G_j - s back(R)_j|^2 = |G_j|^2 - s (2 - s) |R_j|^2

so one pass over G suffices, and all else is as small as R. Matrices of equal shapes are done as one
stack: a small model's step is launches. A stored basis is orthonormal but for its rounding, which
the norms of two steps have in common; c compares these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nibble.numerics import lowrank
from nibble.optim.balanced import Rest, balanced
from nibble.optim.projection import Projection


class Residual(NamedTuple):
    """X, in the gradient's type (None: nothing is projected back), and f, float32 [1 or m, 1 or n],
    for an update that is multiplied by the group's scale; or, for f, a `rest` that is no multiple
    of the gradient.
    """

    small: Tensor | None
    factor: Tensor | None
    rest: Rest | None = None


class Matrix(NamedTuple):
    """One of many: its projection and state, gradient G, projected gradient R and update U."""

    projection: Projection
    state: dict[str, Any]
    grad: Tensor
    small_grad: Tensor
    update: Tensor


def residuals(matrices: Sequence[Matrix]) -> Iterator[tuple[int, Residual]]:
    """The residual of each matrix, by its index, in an order of their own; each is good until the
    next is asked for. The norms in their states are those of this step.
    """
    alike: dict[Any, list[int]] = {}
    for index, one in enumerate(matrices):
        is_cut = one.projection.part.axis is not None
        key = (index,) if is_cut else (one.grad.shape, one.update.shape, one.grad.dtype)
        alike.setdefault(key, []).append(index)
    for members in alike.values():
        some = [matrices[index] for index in members]
        if some[0].projection.low.residual == "balanced":
            for index, rest in zip(members, balanced(some), strict=True):
                one = matrices[index]
                yield index, Residual(one.update.to(one.grad.dtype), None, rest)
            del rest  # or its buffer stays until after the next one is made
        else:
            yield from zip(members, _stacked(some), strict=True)


def _stacked(members: list[Matrix]) -> list[Residual]:
    """Of matrices that are alike, or of one."""
    low, projection = members[0].projection.low, members[0].projection
    updates = torch.stack([one.update for one in members])
    small_grads = torch.stack([one.small_grad for one in members])
    if low.residual == "tensor":
        sum_ = projection.part.sum_ if projection.small_axis is not None else None
        factors = lowrank.tensor_ratio(updates, small_grads, sum_=sum_).view(-1, 1, 1)
    else:
        factors = lowrank.channel_ratios(updates, small_grads, dim=_dim(projection))
    if low.keeps_norm:
        norms = _norms(members, factors, small_grads)
        kept = [one.state["residual_norm"] for one in members]
        limits = lowrank.growth_factor(norms, torch.stack(kept), norm_growth=low.norm_growth)
        torch._foreach_copy_(kept, list((norms * limits).unbind()))
        factors = factors * limits.view(-1, 1, 1)
    if low.residual != "fira":
        return [Residual(None, factor) for factor in factors.unbind()]
    small = (updates - factors * small_grads).to(members[0].grad.dtype)
    # The scale multiplies the whole later, and is meant for the basis alone.
    factors = factors / low.scale
    return [Residual(*both) for both in zip(small.unbind(), factors.unbind(), strict=True)]


def _norms(members: list[Matrix], factors: Tensor, small_grads: Tensor) -> Tensor:
    """|phi o (G - scale back(R))| of each matrix, or |phi o G|, [k]."""
    low, projection = members[0].projection.low, members[0].projection
    dim = (0, 1) if low.residual == "tensor" else _dim(projection)
    sizes = [
        torch.linalg.vector_norm(one.grad, dim=dim, keepdim=True, dtype=torch.float32)
        for one in members
    ]
    squares = (factors * torch.stack(sizes)).square().sum((1, 2))
    if projection.sums:  # all have part of each channel of G, and the whole of R
        projection.part.sum_([squares])
    if low.residual == "fira":
        inside = torch.linalg.vector_norm(small_grads, dim=_dim(projection), keepdim=True)
        share = low.scale * (2.0 - low.scale)
        squares = squares - share * (factors * inside).square().sum((1, 2))
    if projection.small_axis is not None:  # each has its own channels
        projection.part.sum_([squares])
    return squares.clamp(min=0.0).sqrt()


def _dim(projection: Projection) -> int:
    """Along which channels are summed: they run along the side that is not projected."""
    return -2 if projection.low.sides(projection.shape) == ("left",) else -1
