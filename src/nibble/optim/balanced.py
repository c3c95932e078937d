"""The residual `balanced`: what a projection leaves out, with rows and columns of equal norms.

    W <- W - lr (scale back(U) + SIZE rms(U) a o E o b),     E = G - back(R)

a and b of numerics/balancing.py give E rows and columns whose root mean square is 1, so its
elements move SIZE times as far as Adam lets those of U, which are damped by `scale` as GaLore has
it. The projected part has momentum, the rest none, and no state either. What rounding leaves of a
gradient that lies within its basis is not to be blown up: below NOISE of the gradient's norm the
rest fades out.

E is made once, by a product that starts from G, in the gradient's type and in one buffer of as many
matrices as fit; from there it is balanced, scaled and made part of the update in place, so a `Rest`
is good until the next one is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod, sqrt
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nibble.kernels.steps import step_kernels
from nibble.numerics import balancing, lowrank
from nibble.optim import batches

if TYPE_CHECKING:
    from nibble.optim.residuals import Matrix

SIZE = 2.0
"""Of the rest: 1/4, 1/2, 1 and 4 learnt less (dev/LOG.md)."""
NOISE = 1e-2
"""Of a gradient's norm: several times what bfloat16 rounds off."""


class Rest(NamedTuple):
    """E, in the gradient's type and in a buffer, and its factors: `rows` [m, 1] and `columns`
    [1, n] float32, the former for an update that is multiplied by the group's scale.
    """

    outside: Tensor
    rows: Tensor
    columns: Tensor

    def scaled_(self, rows: slice) -> Tensor:
        """Some rows of a o E o b, in the place of E: to be asked for once."""
        some = self.outside[rows]
        return _steps(some).scale_(some, self.rows[rows], self.columns)


def balanced(members: Sequence[Matrix]) -> Iterator[Rest]:
    """The rest of each of some matrices that are alike, or of one that is cut."""
    grad = members[0].grad
    each = max(1, batches.BATCH_NBYTES // max(1, grad.numel() * grad.element_size()))
    shape = (min(each, len(members)), *grad.shape)
    buffer = torch.empty(shape, dtype=grad.dtype, device=grad.device)
    for start in range(0, len(members), each):
        some = members[start : start + each]
        yield from _balanced(some, buffer[: len(some)])


def _balanced(members: Sequence[Matrix], outside: Tensor) -> list[Rest]:
    """Write E of all into `outside` [k, m, n], and find its factors."""
    projection = members[0].projection
    low, part = projection.low, projection.part
    for one, own in zip(members, outside, strict=True):
        _outside(one, out=own)
    steps = _steps(outside)
    sums = steps.squared_sums(outside)
    ones = torch.ones(len(members), outside.shape[2], device=outside.device)
    first = sums.over_columns(ones)
    norms = [torch.linalg.vector_norm(one.grad, dtype=torch.float32) for one in members]
    sizes = torch.stack([first.sum(1), torch.stack(norms).square_()])
    if part.axis is not None:
        part.sum_([sizes])
    mean = (sizes[0] / prod(part.shape)).clamp_(min=torch.finfo().tiny)
    factors = balancing.balancing_factors(
        sums,
        first,
        mean=mean,
        inverse_means_=steps.inverse_means_,
        shape=part.shape,
        sum_rows=part.sum_ if part.axis == 1 else None,
        sum_columns=part.sum_ if part.axis == 0 else None,
    )
    moved = torch.stack([torch.linalg.vector_norm(one.update) for one in members])
    if projection.small_axis is not None:
        part.sum_([moved.square_()])
        moved.sqrt_()
    size = moved / sqrt(prod(low.projected_shape(projection.shape)))
    share = (sizes[0] / (NOISE**2 * sizes[1]).clamp_(min=torch.finfo().tiny)).clamp_(max=1.0)
    of_rows = factors[0] * (SIZE * size * share / (low.scale * mean.sqrt())).unsqueeze(-1)
    return [
        Rest(own, rows.unsqueeze(1), columns.unsqueeze(0))
        for own, rows, columns in zip(outside, of_rows, factors[1], strict=True)
    ]


def _steps(tensor: Tensor) -> balancing.Balancing:
    kernels = step_kernels(tensor.device.type)
    return balancing.EAGER if kernels is None else kernels.balancing


def _outside(one: Matrix, *, out: Tensor) -> None:
    """G - back(R)."""
    left, right = one.projection.own_bases(one.state, dtype=one.grad.dtype)
    small = one.small_grad.to(one.grad.dtype)
    lowrank.add_back(one.grad, small, left=left, right=right, share=-1.0, out=out)
