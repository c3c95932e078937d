"""LLM.int8 in Triton: unpacking, rounding the tokens, and the mixed product in one kernel.

Around an integer product the eager functions make some ten passes over activations; here one kernel
rounds the tokens and one multiplies, scales, adds outliers and bias, and writes the result once.

Outlier columns are listed on the GPU and their number stays there, so the host never waits: behind
its integer product a program runs over as many columns as the list says, mostly none. Those columns
are part of the integer product too, rounded like the others; what is added for them is the
remainder, (x - s_x c_x / 127) w, so that the sum is x w.
"""

# Triton's kernels are programs of their own language, and its decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.launch import launch
from nibble.numerics.int8 import integer_matmul
from nibble.spec.formats import FormatSpec

TILE_COLUMNS = 1024
TILE_ROWS = 4
NUM_WARPS = 4
MAX_ROW_TILE = 8192
OUTLIERS = 16
"""Outlier columns that are multiplied at once."""
LISTING_COLUMNS = 2048


class Tile(NamedTuple):
    """Tokens, out-features and in-features of one step of a program, and how it runs."""

    tokens: int
    features: int
    depth: int
    num_warps: int
    num_stages: int


PRODUCT = Tile(128, 256, 128, 8, 3)
SMALL_PRODUCT = Tile(64, 128, 128, 4, 3)
"""Where the large tile would leave most of the GPU without work."""
FINISH = Tile(32, 256, 0, 4, 1)
SWATH = 8
"""Tiles of tokens that are multiplied before the next tile of weights is read."""
FEW_TILES = 128


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
def _round_kernel(
    x, codes, scales, flags, threshold, num_columns, TILES: tl.constexpr, COLUMNS: tl.constexpr
):
    """A token's largest value below the threshold, its values as multiples of 1/127 of that, and a
    flag for each column that reaches the threshold."""
    row = tl.program_id(0).to(tl.int64) * num_columns
    largest = tl.zeros([COLUMNS], dtype=tl.float32)
    for tile in range(TILES):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        size = tl.abs(
            tl.load(x + row + column, mask=column < num_columns, other=0.0).to(tl.float32)
        )
        outlier = (threshold > 0) & (size >= threshold)
        tl.store(flags + column, tl.full([COLUMNS], 1, tl.int8), mask=outlier)
        largest = tl.maximum(largest, tl.where(outlier, 0.0, size))
    scale = tl.max(largest, axis=0)
    tl.store(scales + tl.program_id(0), scale)
    inverse = tl.where(scale > 0, tl.div_rn(127.0, tl.where(scale > 0, scale, 1.0)), 0.0)
    for tile in range(TILES):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < num_columns
        level = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32) * inverse
        # Adding 1.5 * 2^23 rounds to the nearest even integer, as torch.round does.
        level = (tl.minimum(tl.maximum(level, -127.0), 127.0) + 12582912.0) - 12582912.0
        tl.store(codes + row + column, level.to(tl.int8), mask=inside)


@triton.jit
def _list_kernel(
    flags, listed, num_columns, ALL: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr
):
    """The flagged columns in order; their number comes first."""
    every = tl.arange(0, ALL)
    total = tl.sum(tl.load(flags + every, mask=every < num_columns, other=0).to(tl.int32), axis=0)
    tl.store(listed, total)
    if total > 0:
        found = 0
        for tile in range(TILES):
            column = tile * COLUMNS + tl.arange(0, COLUMNS)
            flag = tl.load(flags + column, mask=column < num_columns, other=0).to(tl.int32)
            place = found + tl.cumsum(flag, axis=0)
            tl.store(listed + place, column, mask=flag > 0)
            found += tl.sum(flag, axis=0)


@triton.jit
def _finish(
    product, x, x_codes, x_scale, codes, scale, bias, listed, token, feature, num_tokens,
    num_features, num_columns, HAS_BIAS: tl.constexpr, MIXED: tl.constexpr,
    OUTLIERS: tl.constexpr,
):  # fmt: skip
    """An integer product [tokens, features], scaled, with outlier columns and bias, in fp32."""
    value = product.to(tl.float32) * (x_scale[:, None] * (scale * (1 / 16129.0))[None, :])
    if MIXED:
        for begin in range(0, tl.load(listed), OUTLIERS):
            place = begin + tl.arange(0, OUTLIERS)
            known = place < tl.load(listed)
            column = tl.load(listed + 1 + place, mask=known, other=0)
            at = token.to(tl.int64)[:, None] * num_columns + column[None, :]
            inside = (token < num_tokens)[:, None] & known[None, :]
            rounded = tl.load(x_codes + at, mask=inside, other=0).to(tl.float32)
            exact = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            rest = exact - rounded * (x_scale * (1 / 127.0))[:, None]
            at = feature.to(tl.int64)[None, :] * num_columns + column[:, None]
            inside = (feature < num_features)[None, :] & known[:, None]
            weight = tl.load(codes + at, mask=inside, other=0).to(tl.float32)
            weight = weight * (scale * (1 / 127.0))[None, :]
            value = tl.dot(
                rest.to(x.dtype.element_ty), weight.to(x.dtype.element_ty), value,
                input_precision="ieee",
            )  # fmt: skip
    if HAS_BIAS:
        added = tl.load(bias + feature, mask=feature < num_features, other=0.0).to(tl.float32)
        value += added[None, :]
    return value


@triton.jit
def _product_kernel(
    x_codes, codes, x, x_scales, scales, bias, listed, y,
    num_tokens, num_features, num_columns,
    HAS_BIAS: tl.constexpr, MIXED: tl.constexpr, OUTLIERS: tl.constexpr, SWATH: tl.constexpr,
    WHOLE: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of the mixed product. WHOLE: in-features come in whole steps."""
    tall, wide = tl.cdiv(num_tokens, TOKENS), tl.cdiv(num_features, FEATURES)
    swath = tl.program_id(0) // (SWATH * wide)
    height = tl.minimum(tall - swath * SWATH, SWATH)
    within = tl.program_id(0) % (SWATH * wide)
    token = (swath * SWATH + within % height) * TOKENS + tl.arange(0, TOKENS)
    feature = (within // height) * FEATURES + tl.arange(0, FEATURES)
    depth = tl.arange(0, DEPTH)
    # Rows behind the last are read as others once more, and not written.
    left = x_codes + (token % num_tokens).to(tl.int64)[:, None] * num_columns + depth[None, :]
    right = codes + (feature % num_features).to(tl.int64)[None, :] * num_columns + depth[:, None]
    product = tl.zeros([TOKENS, FEATURES], dtype=tl.int32)
    for begin in range(0, num_columns, DEPTH):
        if WHOLE:
            a, b = tl.load(left), tl.load(right)
        else:
            inside = begin + depth < num_columns
            a = tl.load(left, mask=inside[None, :], other=0)
            b = tl.load(right, mask=inside[:, None], other=0)
        product = tl.dot(a, b, product, out_dtype=tl.int32)
        left += DEPTH
        right += DEPTH
    x_scale = tl.load(x_scales + token, mask=token < num_tokens, other=0.0)
    scale = tl.load(scales + feature, mask=feature < num_features, other=0.0)
    value = _finish(
        product, x, x_codes, x_scale, codes, scale, bias, listed, token, feature, num_tokens,
        num_features, num_columns, HAS_BIAS, MIXED, OUTLIERS,
    )  # fmt: skip
    at = token.to(tl.int64)[:, None] * num_features + feature[None, :]
    inside = (token < num_tokens)[:, None] & (feature < num_features)[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _finish_kernel(
    product, codes, x_codes, x, x_scales, scales, bias, listed, y,
    num_tokens, num_features, num_columns, product_row,
    HAS_BIAS: tl.constexpr, MIXED: tl.constexpr, OUTLIERS: tl.constexpr, TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """What the vendor's integer product leaves to do."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = (token < num_tokens)[:, None] & (feature < num_features)[None, :]
    at = token.to(tl.int64)[:, None] * product_row + feature[None, :]
    found = tl.load(product + at, mask=inside, other=0)
    x_scale = tl.load(x_scales + token, mask=token < num_tokens, other=0.0)
    scale = tl.load(scales + feature, mask=feature < num_features, other=0.0)
    value = _finish(
        found, x, x_codes, x_scale, codes, scale, bias, listed, token, feature, num_tokens,
        num_features, num_columns, HAS_BIAS, MIXED, OUTLIERS,
    )  # fmt: skip
    at = token.to(tl.int64)[:, None] * num_features + feature[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


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
        (triton.cdiv(shape[0], TILE_ROWS), triton.cdiv(shape[1], TILE_COLUMNS)),
        (codes, scales, dense),
        *shape,
        TILE_ROWS,
        TILE_COLUMNS,
        num_warps=NUM_WARPS,
    )
    return dense


class Rounded(NamedTuple):
    """Tokens in 8 bits: codes int8 [tokens, in], scales fp32 [tokens, 1], and int32 [1 + in], how
    many columns hold outliers and which, or None without a threshold."""

    codes: Tensor
    scales: Tensor
    listed: Tensor | None


def matmul(
    spec: FormatSpec, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Twin of `numerics.int8.matmul`, on CUDA: `x` [..., in] gives [..., out] in x's type."""
    codes, scales = tensors["codes"].contiguous(), tensors["scales"].contiguous()
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if flat.numel() == 0:
        return x.new_zeros(*x.shape[:-1], codes.shape[0])
    rounded = round_tokens(flat, threshold=spec.int8_threshold)
    y = PRODUCTS[CHOSEN](flat, rounded, codes, scales, bias)
    return y.view(*x.shape[:-1], codes.shape[0])


def round_tokens(x: Tensor, *, threshold: float) -> Rounded:
    """Round each row of `x` [tokens, in] to 8 bits, without waiting for the device."""
    tokens, columns = x.shape
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    flags = torch.zeros(columns, dtype=torch.int8, device=x.device)
    tile = min(triton.next_power_of_2(columns), MAX_ROW_TILE)
    launch(
        _round_kernel,
        (tokens,),
        (x, codes, scales, flags),
        float(threshold),
        columns,
        triton.cdiv(columns, tile),
        tile,
        num_warps=max(1, min(8, tile // 512)),
    )
    if threshold <= 0:
        return Rounded(codes, scales, None)
    listed = torch.empty(1 + columns, dtype=torch.int32, device=x.device)
    launch(
        _list_kernel,
        (1,),
        (flags, listed),
        columns,
        triton.next_power_of_2(columns),
        triton.cdiv(columns, LISTING_COLUMNS),
        LISTING_COLUMNS,
        num_warps=NUM_WARPS,
    )
    return Rounded(codes, scales, listed)


def product_in_one(
    x: Tensor, rounded: Rounded, codes: Tensor, scales: Tensor, bias: Tensor | None
) -> Tensor:
    """x [tokens, in] times codes [out, in]: all of the mixed product in one kernel."""
    (tokens, columns), features = x.shape, codes.shape[0]
    y = torch.empty(tokens, features, dtype=x.dtype, device=x.device)
    large = _num_tiles(PRODUCT, tokens, features) >= FEW_TILES
    tile = PRODUCT if large else SMALL_PRODUCT
    launch(
        _product_kernel,
        (_num_tiles(tile, tokens, features),),
        (rounded.codes, codes, x, rounded.scales, scales, *_optional(y, bias, rounded), y),
        tokens,
        features,
        columns,
        bias is not None,
        rounded.listed is not None,
        OUTLIERS,
        SWATH,
        columns % tile.depth == 0,
        tile.tokens,
        tile.features,
        tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y


def product_in_two(
    x: Tensor, rounded: Rounded, codes: Tensor, scales: Tensor, bias: Tensor | None
) -> Tensor:
    """The same by the vendor's integer product, and a kernel for what remains."""
    (tokens, columns), features = x.shape, codes.shape[0]
    y = torch.empty(tokens, features, dtype=x.dtype, device=x.device)
    product = integer_matmul(rounded.codes, codes)
    launch(
        _finish_kernel,
        (triton.cdiv(tokens, FINISH.tokens), triton.cdiv(features, FINISH.features)),
        (
            *(product, codes, rounded.codes, x, rounded.scales, scales),
            *_optional(y, bias, rounded),
            y,
        ),
        tokens,
        features,
        columns,
        product.stride(0),
        bias is not None,
        rounded.listed is not None,
        OUTLIERS,
        FINISH.tokens,
        FINISH.features,
        num_warps=FINISH.num_warps,
    )
    return y


PRODUCTS = {"one": product_in_one, "two": product_in_two}
CHOSEN = "one"
"""Which of them multiplies; bench/int8_attention.py times both."""


def _optional(y: Tensor, bias: Tensor | None, rounded: Rounded) -> tuple[Tensor, Tensor]:
    """Bias and list of outliers; a kernel that uses none needs a pointer all the same."""
    return y if bias is None else bias, rounded.codes if rounded.listed is None else rounded.listed


def _num_tiles(tile: Tile, tokens: int, features: int) -> int:
    return int(triton.cdiv(tokens, tile.tokens) * triton.cdiv(features, tile.features))
