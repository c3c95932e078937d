"""RMS norm in Triton, forward and backward: each element is read once and written once.

A program holds whole rows in registers, so mean, product and both roundings need no second read;
backward takes the mean again from the x that it reads anyway, so nothing but x waits for it. The
gradient of a trained weight is summed by each program over its rows and then over programs, always
in the same order.
"""

# Triton's kernels are programs of their own language, and its decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.launch import launch

TILE_ELEMENTS = 2048
NUM_PARTIAL_SUMS = 512


@triton.jit
def _norm_kernel(
    x,
    weight,
    y,
    num_rows,
    num_columns,
    eps,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < num_columns)
    at = row * num_columns + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < num_columns, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / num_columns + eps)
    normal = value * inverse[:, None]
    if OFFSET:
        scaled = normal * (1.0 + scale)
    else:
        scaled = normal.to(x.dtype.element_ty).to(tl.float32) * scale
    tl.store(y + at, scaled.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward_kernel(
    grad,
    x,
    weight,
    grad_x,
    grad_weight,
    num_rows,
    num_columns,
    eps,
    TILES: tl.constexpr,
    OFFSET: tl.constexpr,
    TRAINED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    scale = tl.load(weight + column, mask=column < num_columns, other=0.0).to(tl.float32)
    if OFFSET:
        scale = 1.0 + scale
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for tile in range(TILES):
        row = (program * TILES + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < num_rows) & (column[None, :] < num_columns)
        at = row * num_columns + column[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        by_output = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, axis=1) / num_columns + eps)[:, None]
        normal = value * inverse
        by_normal = by_output * scale[None, :]
        along = tl.sum(by_normal * normal, axis=1) / num_columns
        by_x = inverse * (by_normal - normal * along[:, None])
        tl.store(grad_x + at, by_x.to(grad_x.dtype.element_ty), mask=inside)
        if TRAINED:
            total += tl.sum(by_output * normal, axis=0)
    if TRAINED:
        tl.store(grad_weight + program * num_columns + column, total, mask=column < num_columns)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool) -> Tensor:
    """Twin of `numerics.layer_functions.rms_norm`, on CUDA."""
    x, weight = x.contiguous(), weight.contiguous()
    dtype = x.dtype if unit_offset else torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel() == 0:
        return y
    num_rows, rows, columns, num_warps = _tile(x)
    launch(
        _norm_kernel,
        (triton.cdiv(num_rows, rows),),
        (x, weight, y),
        num_rows,
        x.shape[-1],
        eps,
        unit_offset,
        rows,
        columns,
        num_warps=num_warps,
    )
    return y


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """Twin of `numerics.layer_functions.rms_norm_backward`, on CUDA."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_x = torch.empty_like(x)
    num_rows, rows, columns, num_warps = _tile(x)
    num_tiles = triton.cdiv(num_rows, rows)
    # A power of two: each value is compiled anew.
    each = triton.next_power_of_2(triton.cdiv(num_tiles, NUM_PARTIAL_SUMS)) if trained else 1
    programs = triton.cdiv(num_tiles, max(each, 1))
    # Of a frozen weight nothing is summed; the kernel needs a pointer all the same.
    partial = (
        torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
        if trained
        else grad_x
    )
    if programs:
        launch(
            _norm_backward_kernel,
            (programs,),
            (grad, x, weight, grad_x, partial),
            num_rows,
            x.shape[-1],
            eps,
            each,
            unit_offset,
            trained,
            rows,
            columns,
            num_warps=num_warps,
        )
    return grad_x, partial.sum(0) if trained else None


def _tile(x: Tensor) -> tuple[int, int, int, int]:
    """Rows of x, rows and columns of a program's tile, and its warps."""
    columns = triton.next_power_of_2(x.shape[-1])
    rows = max(1, TILE_ELEMENTS // columns)
    size = rows * columns
    num_warps = 4 if size <= TILE_ELEMENTS else 8 if size <= 4 * TILE_ELEMENTS else 16
    return x.numel() // x.shape[-1], rows, columns, num_warps
