"""The residual `balanced`: what a projection leaves out, with rows and columns of equal norms.

    W <- W - lr (scale back(U) + SIZE rms(U) a o E o b),     E = G - back(R)

a and b of numerics/balancing.py give E rows and columns whose root mean square is 1, so its
elements move SIZE times as far as Adam lets those of U, which are damped by `scale` as GaLore has
it. The projected part has momentum, the rest none, and no state either. What rounding leaves of a
gradient that lies within its basis is not to be blown up: below NOISE of the gradient's norm the
rest fades out.

Squares of E are held in float32 of as many matrices as fit; E itself is made by rows, here and once
more when weights move.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nibble.numerics import lowrank
from nibble.numerics.balancing import balancing_factors
from nibble.optim import batches
from nibble.optim.projection import Bases

if TYPE_CHECKING:
    from nibble.optim.residuals import Matrix

SIZE = 2.0
"""Of the rest: 1/4, 1/2, 1 and 4 learnt less (dev/LOG.md)."""
NOISE = 1e-2
"""Of a gradient's norm: several times what bfloat16 rounds off."""
_ROW_BYTES = 16


class Rest(NamedTuple):
    """E = G - back(R) and its factors: `small` R in the gradient's type, `rows` [m, 1] and
    `columns` [1, n] float32, the former for an update that is multiplied by the group's scale.
    """

    small: Tensor
    rows: Tensor
    columns: Tensor

    def of(self, grad: Tensor, bases: Bases, rows: slice) -> Tensor:
        """Some rows of a o E o b, float32."""
        scaled = outside(grad, self.small, bases, rows).mul_(self.rows[rows])
        return scaled.mul_(self.columns)


def outside(grad: Tensor, small: Tensor, bases: Bases, rows: slice) -> Tensor:
    """Some rows of G - back(R), float32, a tensor of its own."""
    left, right = bases
    if left is None:
        inside = lowrank.project_back(small[rows], left=None, right=right)
    else:
        inside = lowrank.project_back(small, left=left[rows], right=right)
    return grad[rows].float() - inside


def balanced(members: Sequence[Matrix]) -> list[Rest]:
    """The rest of each of some matrices that are alike, or of one that is cut."""
    rows, columns = members[0].grad.shape
    each = max(1, batches.BATCH_NBYTES // (4 * max(1, rows * columns)))
    found: list[Rest] = []
    for start in range(0, len(members), each):
        found += _balanced(members[start : start + each])
    return found


def _balanced(members: Sequence[Matrix]) -> list[Rest]:
    projection = members[0].projection
    low, part = projection.low, projection.part
    smalls = [one.small_grad.to(one.grad.dtype) for one in members]
    shape, device = (len(members), *members[0].grad.shape), members[0].grad.device
    squares = torch.empty(shape, dtype=torch.float32, device=device)
    for one, small, own in zip(members, smalls, squares, strict=True):
        _square_(own, one, small)
    norms = [torch.linalg.vector_norm(one.grad, dtype=torch.float32) for one in members]
    sizes = torch.stack([squares.sum((1, 2)), torch.stack(norms).square_()])
    if part.axis is not None:
        part.sum_([sizes])
    mean = (sizes[0] / prod(part.shape)).clamp_(min=torch.finfo().tiny)
    factors = balancing_factors(
        squares.div_(mean.view(-1, 1, 1)),
        shape=part.shape,
        sum_rows=part.sum_ if part.axis == 1 else None,
        sum_columns=part.sum_ if part.axis == 0 else None,
    )
    moved = torch.stack([one.update.square().sum() for one in members])
    if projection.small_axis is not None:
        part.sum_([moved])
    size = moved.sqrt_() / sqrt(prod(low.projected_shape(projection.shape)))
    share = (sizes[0] / (NOISE**2 * sizes[1]).clamp_(min=torch.finfo().tiny)).clamp_(max=1.0)
    of_rows = factors[0] * (SIZE * size * share / (low.scale * mean.sqrt())).unsqueeze(-1)
    return [
        Rest(small, own.unsqueeze(1), other.unsqueeze(0))
        for small, own, other in zip(smalls, of_rows, factors[1], strict=True)
    ]


def _square_(squares: Tensor, one: Matrix, small: Tensor) -> None:
    """Write E o E of one matrix, some rows at a time."""
    grad = one.grad
    bases = one.projection.own_bases(one.state, dtype=grad.dtype)
    step = max(1, batches.BATCH_NBYTES // (_ROW_BYTES * max(1, grad.shape[1])))
    for start in range(0, grad.shape[0], step):
        rows = slice(start, start + step)
        torch.square(outside(grad, small, bases, rows), out=squares[rows])
