"""LLM.int8 in Triton: unpacking, rounding the tokens, and scaling the integer product.

The integer product itself is the vendor's (`torch._int_mm`). Around it the eager functions make
some ten passes over the activations; here two kernels read them (the second from the cache) and one
scales the result. Outlier columns are found on the GPU; only their number comes back to the host,
after the integer product has been queued, so that the wait is hidden behind it.
"""

# Triton's kernels are programs of their own language, and its decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.launch import launch
from nibble.numerics.int8 import add_outliers, integer_matmul
from nibble.spec.formats import FormatSpec

TILE_COLUMNS = 1024
TILE_ROWS = 4
NUM_WARPS = 4


@triton.jit
def _unpack_kernel(
    codes, scales, dense, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < num_columns)
    at = row * num_columns + column
    scale = tl.load(scales + row, mask=row < num_rows, other=0.0)
    weight = tl.load(codes + at, mask=inside, other=0).to(tl.float32) * scale * (1 / 127.0)
    tl.store(dense + at, weight.to(dense.dtype.element_ty), mask=inside)


@triton.jit
def _measure_kernel(
    x, scales, flags, threshold, num_columns, TILES: tl.constexpr, COLUMNS: tl.constexpr
):
    """A token's largest value below the threshold, and a flag for each column that reaches it."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([COLUMNS], dtype=tl.float32)
    for tile in range(TILES):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        value = tl.load(x + row * num_columns + column, mask=column < num_columns, other=0.0)
        size = tl.abs(value.to(tl.float32))
        outlier = (threshold > 0) & (size >= threshold)
        tl.store(flags + column, tl.full([COLUMNS], 1, tl.int8), mask=outlier)
        largest = tl.maximum(largest, tl.where(outlier, 0.0, size))
    tl.store(scales + row, tl.max(largest, axis=0))


@triton.jit
def _round_kernel(x, scales, flags, codes, num_columns, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_columns
    at = row * num_columns + column
    scale = tl.load(scales + row)
    inverse = tl.where(scale > 0, tl.div_rn(127.0, tl.where(scale > 0, scale, 1.0)), 0.0)
    level = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inverse
    # Adding 1.5 * 2^23 rounds to the nearest even integer, as torch.round does.
    level = (tl.minimum(tl.maximum(level, -127.0), 127.0) + 12582912.0) - 12582912.0
    level = tl.where(tl.load(flags + column, mask=inside, other=0) == 0, level, 0.0)
    tl.store(codes + at, level.to(tl.int8), mask=inside)


@triton.jit
def _rescale_kernel(
    product,
    x_scales,
    scales,
    scaled,
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < num_columns)
    at = row * num_columns + column
    x_scale = tl.load(x_scales + row, mask=row < num_rows, other=0.0)
    scale = tl.load(scales + column, mask=column < num_columns, other=0.0) * (1 / 16129.0)
    value = tl.load(product + at, mask=inside, other=0).to(tl.float32) * (x_scale * scale)
    tl.store(scaled + at, value.to(scaled.dtype.element_ty), mask=inside)


def unpack(
    spec: FormatSpec, tensors: Mapping[str, Tensor], *, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Twin of `numerics.int8.unpack`, on CUDA: `shape` is (rows, in), `tensors` any rows."""
    codes, scales = tensors["codes"].contiguous(), tensors["scales"].contiguous()
    dense = torch.empty(shape, dtype=dtype, device=codes.device)
    if dense.numel() == 0:
        return dense
    launch(
        _unpack_kernel,
        _tiles(shape),
        (codes, scales, dense),
        *shape,
        TILE_ROWS,
        TILE_COLUMNS,
        num_warps=NUM_WARPS,
    )
    return dense


def matmul(spec: FormatSpec, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Twin of `numerics.int8.matmul`, on CUDA: `x` [..., in] gives [..., out] in x's type."""
    codes, scales = tensors["codes"].contiguous(), tensors["scales"].contiguous()
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if flat.numel() == 0:
        return x.new_zeros(*x.shape[:-1], codes.shape[0])
    x_codes, x_scales, flags = round_tokens(flat, threshold=spec.int8_threshold)
    product = rescale(integer_matmul(x_codes, codes), x_scales, scales, dtype=x.dtype)
    if spec.int8_threshold > 0:
        columns = flags.nonzero().squeeze(1)
        product = add_outliers(product, flat, codes, scales, columns)
    return product.view(*x.shape[:-1], codes.shape[0])


def round_tokens(x: Tensor, *, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Round each row of `x` [tokens, in] to 8 bits, outlier columns to zero, without waiting.

    Returns codes int8 [tokens, in], scales float32 [tokens, 1] and flags int8 [in], 1 for outliers.
    """
    tokens, columns = x.shape
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    flags = torch.zeros(columns, dtype=torch.int8, device=x.device)
    tiles = triton.cdiv(columns, TILE_COLUMNS)
    launch(
        _measure_kernel,
        (tokens,),
        (x, scales, flags),
        float(threshold),
        columns,
        tiles,
        TILE_COLUMNS,
        num_warps=NUM_WARPS,
    )
    launch(
        _round_kernel,
        (tokens, tiles),
        (x, scales, flags, codes),
        columns,
        TILE_COLUMNS,
        num_warps=NUM_WARPS,
    )
    return codes, scales, flags


def rescale(product: Tensor, x_scales: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Twin of `numerics.int8.rescale`: an int32 product [tokens, out] times both scales."""
    product = product.contiguous()
    scaled = torch.empty(product.shape, dtype=dtype, device=product.device)
    rows, columns = product.shape
    launch(
        _rescale_kernel,
        _tiles((rows, columns)),
        (product, x_scales, scales, scaled),
        rows,
        columns,
        TILE_ROWS,
        TILE_COLUMNS,
        num_warps=NUM_WARPS,
    )
    return scaled


def _tiles(shape: tuple[int, int]) -> tuple[int, int]:
    return triton.cdiv(shape[0], TILE_ROWS), triton.cdiv(shape[1], TILE_COLUMNS)
