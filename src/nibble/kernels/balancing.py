"""Balancing in Triton: weighted sums of squares over rows and columns, and what is made of them.

The eager twin (numerics/balancing.py) writes the squares in float32 and multiplies them by vectors,
which a GPU's products do at a fraction of its bandwidth. Here a matrix is read in its own type and
squared on the way. A program sums whole rows; of columns each sums some rows, and another kernel
adds these parts in their order, so equal matrices give equal bits, whatever is beside them.

A whole matrix is read once a round: a program holds some rows, which gives their weights, and adds
them with these to its part of the columns' sums. Rows wider than WIDEST, and matrices whose sums
are of several processes, have two passes a round.
"""

# Triton's kernels are programs of their own language, and its decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.launch import launch
from nibble.numerics.balancing import NOTHING, Balancing, SquaredSums, step_by_step

OVER_COLUMNS, OVER_ROWS, SCALED = (4, 1024), (16, 256), (4, 1024)
"""Rows and columns of a tile."""
ADDED, INVERTED = 256, 1024
NUM_PROGRAMS, MAX_PARTS = 1024, 64
"""For each matrix, to keep a large GPU busy, where it has as many tiles; but a narrow one is not
cut into more parts than are quickly added.
"""
NUM_WARPS = 4
WIDEST, HELD = 1 << 15, 1 << 14
"""Numbers of a row that a program can hold, and of the rows that it holds at a time."""
ROUND_PARTS, PART_ROWS = 256, 16
"""Programs of a round, for each matrix, and rows that each has at least: parts of sums are small
beside the matrix."""
ADDED_PARTS, ADDED_COLUMNS = 32, 128
"""A tile of parts."""


@triton.jit
def _round_kernel(
    matrices,
    of_columns,
    row_lengths,
    of_rows,
    parts,
    num_rows,
    num_columns,
    part_rows,
    NOTHING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part, which = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    across = column < num_columns
    weight = tl.load(of_columns + which * num_columns + column, mask=across, other=0.0)
    length = tl.load(row_lengths + which)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, part_rows, ROWS):
        row = part * part_rows + start + tl.arange(0, ROWS)
        there = row < num_rows
        at = (which * num_rows + row[:, None]) * num_columns + column[None, :]
        inside = there[:, None] & across[None, :]
        x = tl.load(matrices + at, mask=inside, other=0.0).to(tl.float32)
        square = x * x
        mean = tl.sum(square * weight[None, :], axis=1) / length
        inverse = tl.where(mean > NOTHING, 1.0 / tl.maximum(mean, NOTHING), 0.0)
        tl.store(of_rows + which * num_rows + row, inverse, mask=there)
        total += tl.sum(square * inverse[:, None], axis=0)
    target = parts + (which * tl.num_programs(0) + part) * num_columns + column
    tl.store(target, total, mask=across)


@triton.jit
def _add_and_invert_kernel(
    parts,
    lengths,
    inverses,
    num_parts,
    num,
    NOTHING: tl.constexpr,
    PARTS: tl.constexpr,
    EACH: tl.constexpr,
):
    which = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * EACH + tl.arange(0, EACH)
    total = tl.zeros([EACH], tl.float32)
    for start in range(0, num_parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part[:, None] < num_parts) & (index[None, :] < num)
        at = (which * num_parts + part[:, None]) * num + index[None, :]
        total += tl.sum(tl.load(parts + at, mask=inside, other=0.0), axis=0)
    mean = total / tl.load(lengths + which)
    inverse = tl.where(mean > NOTHING, 1.0 / tl.maximum(mean, NOTHING), 0.0)
    tl.store(inverses + which * num + index, inverse, mask=index < num)


@triton.jit
def _over_columns_kernel(
    matrices, weights, sums, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    which = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    starts = matrices + (which * num_rows + row[:, None]) * num_columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, num_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row[:, None] < num_rows) & (column[None, :] < num_columns)
        x = tl.load(starts + column[None, :], mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(
            weights + which * num_columns + column, mask=column < num_columns, other=0.0
        )
        total += x * x * weight[None, :]
    tl.store(sums + which * num_rows + row, tl.sum(total, axis=1), mask=row < num_rows)


@triton.jit
def _over_rows_kernel(
    matrices,
    weights,
    sums,
    num_rows,
    num_columns,
    num_parts,
    part_rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part, which = tl.program_id(1), tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, part_rows, ROWS):
        row = part * part_rows + start + tl.arange(0, ROWS)
        there = row < num_rows
        inside = there[:, None] & (column[None, :] < num_columns)
        at = (which * num_rows + row[:, None]) * num_columns + column[None, :]
        x = tl.load(matrices + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weights + which * num_rows + row, mask=there, other=0.0)
        total += x * x * weight[:, None]
    target = sums + (which * num_parts + part) * num_columns + column
    tl.store(target, tl.sum(total, axis=0), mask=column < num_columns)


@triton.jit
def _add_parts_kernel(parts, sums, num_parts, num, EACH: tl.constexpr):
    which = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * EACH + tl.arange(0, EACH)
    total = tl.zeros([EACH], tl.float32)
    for part in range(num_parts):
        at = (which * num_parts + part) * num + index
        total += tl.load(parts + at, mask=index < num, other=0.0)
    tl.store(sums + which * num + index, total, mask=index < num)


@triton.jit
def _inverse_kernel(sums, lengths, num, NOTHING: tl.constexpr, EACH: tl.constexpr):
    which = tl.program_id(1)
    index = tl.program_id(0) * EACH + tl.arange(0, EACH)
    target = sums + which * num + index
    mean = tl.load(target, mask=index < num, other=1.0) / tl.load(lengths + which)
    inverse = tl.where(mean > NOTHING, 1.0 / tl.maximum(mean, NOTHING), 0.0)
    tl.store(target, inverse, mask=index < num)


@triton.jit
def _scale_kernel(
    matrix, rows, columns, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there, across = row < num_rows, column < num_columns
    target = matrix + row[:, None] * num_columns + column[None, :]
    inside = there[:, None] & across[None, :]
    x = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    x = x * tl.load(rows + row, mask=there, other=0.0)[:, None]
    x = x * tl.load(columns + column, mask=across, other=0.0)[None, :]
    tl.store(target, x.to(matrix.dtype.element_ty), mask=inside)


def squared_sums(matrices: Tensor) -> SquaredSums:
    """Those of contiguous `matrices` [k, m, n], float32 or bfloat16 or float16; holds nothing."""
    assert matrices.is_contiguous()
    own = _Sums(matrices)
    stepwise = step_by_step(own.over_columns, own.over_rows, inverse_means_)
    return SquaredSums(
        over_columns=own.over_columns,
        over_rows=own.over_rows,
        balanced_once=own.balanced_once if matrices.shape[2] <= WIDEST else stepwise,
    )


@dataclass(frozen=True)
class _Sums:
    """The launches of sums over `matrices` [k, m, n]."""

    matrices: Tensor

    def over_columns(self, weights: Tensor) -> Tensor:
        """Of rows."""
        count, num_rows, num_columns = self.matrices.shape
        sums = self._empty(num_rows)
        launch(
            _over_columns_kernel,
            (-(-num_rows // OVER_COLUMNS[0]), count),
            (self.matrices, weights.contiguous(), sums),
            num_rows,
            num_columns,
            *OVER_COLUMNS,
            num_warps=NUM_WARPS,
        )
        return sums

    def over_rows(self, weights: Tensor) -> Tensor:
        """Of columns."""
        count, num_rows, num_columns = self.matrices.shape
        tile_rows, tile_columns = OVER_ROWS
        across = -(-num_columns // tile_columns)
        num_parts = max(1, min(NUM_PROGRAMS // across, -(-num_rows // tile_rows), MAX_PARTS))
        part_rows = -(-num_rows // (num_parts * tile_rows)) * tile_rows
        num_parts = -(-num_rows // part_rows)
        parts, sums = self._empty(num_parts, num_columns), self._empty(num_columns)
        launch(
            _over_rows_kernel,
            (across, num_parts, count),
            (self.matrices, weights.contiguous(), parts),
            num_rows,
            num_columns,
            num_parts,
            part_rows,
            *OVER_ROWS,
            num_warps=NUM_WARPS,
        )
        grid = (-(-num_columns // ADDED), count)
        launch(_add_parts_kernel, grid, (parts, sums), num_parts, num_columns, ADDED, num_warps=2)
        return sums

    def balanced_once(
        self, of_columns: Tensor, row_lengths: Tensor, column_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both, in one pass over the matrices."""
        count, num_rows, num_columns = self.matrices.shape
        tile_columns = max(16, triton.next_power_of_2(num_columns))
        tile_rows = max(1, HELD // tile_columns)
        part_rows = max(PART_ROWS, -(-num_rows // ROUND_PARTS))
        part_rows = -(-part_rows // tile_rows) * tile_rows
        num_parts = -(-num_rows // part_rows)
        of_rows, inverses = self._empty(num_rows), self._empty(num_columns)
        parts = self._empty(num_parts, num_columns)
        launch(
            _round_kernel,
            (num_parts, count),
            (self.matrices, of_columns, row_lengths, of_rows, parts),
            num_rows,
            num_columns,
            part_rows,
            NOTHING,
            tile_rows,
            tile_columns,
            num_warps=16 if tile_rows * tile_columns >= HELD else NUM_WARPS,
        )
        launch(
            _add_and_invert_kernel,
            (-(-num_columns // ADDED_COLUMNS), count),
            (parts, column_lengths, inverses),
            num_parts,
            num_columns,
            NOTHING,
            ADDED_PARTS,
            ADDED_COLUMNS,
            num_warps=NUM_WARPS,
        )
        return of_rows, inverses

    def _empty(self, *shape: int) -> Tensor:
        """Float32, for each matrix."""
        matrices = self.matrices
        return torch.empty(len(matrices), *shape, dtype=torch.float32, device=matrices.device)


def inverse_means_(sums: Tensor, lengths: Tensor) -> Tensor:
    """Balancing's, of contiguous sums."""
    count, num = sums.shape
    assert sums.is_contiguous()
    grid = (-(-num // INVERTED), count)
    launch(_inverse_kernel, grid, (sums, lengths), num, NOTHING, INVERTED, num_warps=NUM_WARPS)
    return sums


def scale_(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Balancing's, of a contiguous matrix."""
    num_rows, num_columns = matrix.shape
    assert matrix.is_contiguous() and rows.is_contiguous() and columns.is_contiguous()
    launch(
        _scale_kernel,
        (-(-num_rows // SCALED[0]), -(-num_columns // SCALED[1])),
        (matrix, rows, columns),
        num_rows,
        num_columns,
        *SCALED,
        num_warps=NUM_WARPS,
    )
    return matrix


TRITON = Balancing(squared_sums=squared_sums, inverse_means_=inverse_means_, scale_=scale_)
