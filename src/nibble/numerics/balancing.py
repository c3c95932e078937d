"""Scaling rows and columns of a matrix to equal norms.

For X [m, n] there are positive a [m] and b [n] so that all rows and all columns of a o X o b have a
root mean square of 1 (Sinkhorn and Knopp 1967, applied to the squares of X; unless zeros forbid
it). Gradient steps scaled so need no state and learn about as well as
Adam's (Scetbon et al., SinkGD, arXiv 2502.06742). Each round divides by the norms of rows and then
of columns: two products of the squares with a vector, so X itself is not scaled until the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_ROUNDS = 5
"""As in the paper. One learnt less, three a little less, though they leave rows within 0.4 % of one
size in the mean, and eight no more (dev/LOG.md).
"""
NOTHING = 1e-12
"""Of the mean square: rows and columns below are left at zero."""

Sum = Callable[[Sequence[Tensor]], None]
Round = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class SquaredSums:
    """Weighted sums of the squares of some matrices [k, m, n], float32.

    over_columns    weights [k, n] -> sums [k, m]
    over_rows       weights [k, m] -> sums [k, n]
    balanced_once   weights of columns [k, n], lengths of rows and columns [k] -> weights of rows
                    [k, m] and columns: `inverse_means_` of one kind of sums, then of the other
    """

    over_columns: Callable[[Tensor], Tensor]
    over_rows: Callable[[Tensor], Tensor]
    balanced_once: Round


@dataclass(frozen=True, kw_only=True)
class Balancing:
    """What balancing does with large tensors: here eagerly, or by kernels/balancing.py.

    squared_sums     of matrices [k, m, n] of any type
    inverse_means_   sums [k, l] become l / sums for lengths l [k], in place; what is NOTHING, 0
    scale_           a matrix [m, n] times rows [m, 1] and columns [1, n], in place, rounded once
    """

    squared_sums: Callable[[Tensor], SquaredSums]
    inverse_means_: Callable[[Tensor, Tensor], Tensor]
    scale_: Callable[[Tensor, Tensor, Tensor], Tensor]


def squared_sums(matrices: Tensor) -> SquaredSums:
    """Those of `matrices` [k, m, n] of any type; holds their squares in float32."""
    squares = matrices.to(torch.float32, copy=True).square_()

    def over_columns(weights: Tensor) -> Tensor:
        return (squares @ weights.unsqueeze(2)).squeeze(2)

    def over_rows(weights: Tensor) -> Tensor:
        return (squares.mT @ weights.unsqueeze(2)).squeeze(2)

    return SquaredSums(
        over_columns=over_columns,
        over_rows=over_rows,
        balanced_once=step_by_step(over_columns, over_rows, inverse_means_),
    )


def step_by_step(
    over_columns: Callable[[Tensor], Tensor],
    over_rows: Callable[[Tensor], Tensor],
    inverse_means_: Callable[[Tensor, Tensor], Tensor],
) -> Round:
    """`balanced_once` made of these."""

    def balanced_once(
        of_columns: Tensor, row_lengths: Tensor, column_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        of_rows = inverse_means_(over_columns(of_columns), row_lengths)
        return of_rows, inverse_means_(over_rows(of_rows), column_lengths)

    return balanced_once


def inverse_means_(sums: Tensor, lengths: Tensor) -> Tensor:
    """Balancing's, eagerly."""
    nothing = sums.div_(lengths.unsqueeze(1)) <= NOTHING
    return sums.clamp_(min=NOTHING).reciprocal_().masked_fill_(nothing, 0.0)


def scale_(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Balancing's, eagerly."""
    return matrix.copy_(matrix.float().mul_(rows).mul_(columns))


EAGER = Balancing(squared_sums=squared_sums, inverse_means_=inverse_means_, scale_=scale_)


def balancing_factors(
    sums: SquaredSums,
    first: Tensor,
    *,
    mean: Tensor,
    inverse_means_: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, int],
    sum_rows: Sum | None = None,
    sum_columns: Sum | None = None,
    num_rounds: int = NUM_ROUNDS,
) -> tuple[Tensor, Tensor]:
    """Factors (a [k, m], b [k, n]) of matrices X, for X over the root of its `mean` square [k].

    `first` [k, m] is what `sums` give of rows with weights of 1; it is changed. Rows and columns
    of zeros get a 0. Of parts of matrices of `shape`, `sum_rows` adds the sums over columns of all
    parts, or `sum_columns` those over rows, in place; `mean` is of the whole.
    """
    row_length, column_length = (mean * count for count in reversed(shape))
    if sum_rows is None and sum_columns is None:
        of_columns = torch.ones((len(first), shape[1]), device=first.device)
        for _ in range(num_rounds):
            of_rows, of_columns = sums.balanced_once(of_columns, row_length, column_length)
        return of_rows.sqrt_(), of_columns.sqrt_()
    row_sums = first
    for turn in range(num_rounds):
        if sum_rows is not None:
            sum_rows([row_sums])
        of_rows = inverse_means_(row_sums, row_length)
        column_sums = sums.over_rows(of_rows)
        if sum_columns is not None:
            sum_columns([column_sums])
        of_columns = inverse_means_(column_sums, column_length)
        if turn + 1 < num_rounds:
            row_sums = sums.over_columns(of_columns)
    return of_rows.sqrt_(), of_columns.sqrt_()
