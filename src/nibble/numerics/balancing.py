"""Scaling rows and columns of a matrix to equal norms.

For X [m, n] there are positive a [m] and b [n] so that all rows and all columns of a o X o b have a
root mean square of 1 (Sinkhorn and Knopp 1967, applied to the squares of X; unless zeros forbid
it). Gradient steps scaled so need no state and learn about as well as
Adam's (Scetbon et al., SinkGD, arXiv 2502.06742). Each round divides by the norms of rows and then
of columns: two products of the squares with a vector, so X itself is not scaled until the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NUM_ROUNDS = 5
"""As in the paper. One round learnt less (dev/LOG.md)."""
NOTHING = 1e-12
"""Of the mean square: rows and columns below are left at zero."""

Sum = Callable[[Sequence[Tensor]], None]


def balancing_factors(
    squares: Tensor,
    *,
    shape: tuple[int, int],
    sum_rows: Sum | None = None,
    sum_columns: Sum | None = None,
    num_rounds: int = NUM_ROUNDS,
) -> tuple[Tensor, Tensor]:
    """Factors (a [k, m], b [k, n]) of matrices, given their float32 `squares` [k, m, n], which have
    a mean of 1.

    Rows and columns of zeros get a 0. Of parts of matrices of `shape`, `sum_rows` adds the sums
    over columns of all parts, or `sum_columns` those over rows, in place.
    """
    num_rows, num_columns = shape
    of_columns = squares.new_ones(squares.shape[0], squares.shape[2], 1)
    for _ in range(num_rounds):
        row_sums = squares @ of_columns
        if sum_rows is not None:
            sum_rows([row_sums])
        of_rows = _inverse(row_sums.div_(num_columns))
        column_sums = squares.mT @ of_rows
        if sum_columns is not None:
            sum_columns([column_sums])
        of_columns = _inverse(column_sums.div_(num_rows))
    return of_rows.squeeze(-1).sqrt_(), of_columns.squeeze(-1).sqrt_()


def _inverse(means: Tensor) -> Tensor:
    return torch.where(means > NOTHING, 1 / means.clamp(min=NOTHING), 0.0)
