"""Weights moved by an update in Triton: each is read and written once.

    move_        W <- (1 - decay) W - rate (U + f o G), rounded at random
    move_int8_   the same for INT8 codes with a scale for each 256 of a row

The eager twins are optim/update.py's lists and numerics/int8_weights.py.
"""

# Triton's kernels are programs of their own language, and its decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.launch import launch
from nibble.kernels.noise import CHANGING, SMALLEST, Place, random_bits, rounded_bfloat16
from nibble.numerics.rounding import Key
from nibble.spec.int8_weights import GROUP

ELEMENTS_A_PROGRAM = 2048
ROWS_A_PROGRAM = 4
NUM_WARPS = 4


@triton.jit
def _total(
    update, grad, factor, at, row, column, inside, UPDATE: tl.constexpr, FACTOR: tl.constexpr
):
    """U + f o G at some elements; FACTOR 0: no G, 1: one f, 2: one a row, 3: one a column."""
    total = tl.zeros(at.shape, dtype=tl.float32)
    if UPDATE:
        total += tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
    if FACTOR > 0:
        if FACTOR == 1:
            f = tl.load(factor)
        else:
            f = tl.load(factor + (row if FACTOR == 2 else column), mask=inside, other=0.0)
        total += tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * f
    return total


@triton.jit(do_not_specialize=CHANGING)
def _move_kernel(
    weight,
    update,
    grad,
    factor,
    share,
    numel,
    columns,
    rate,
    decay,
    key0,
    key1,
    base,
    start,
    width,
    stride,
    UPDATE: tl.constexpr,
    FACTOR: tl.constexpr,
    SHARE: tl.constexpr,
    DECAY_LAST: tl.constexpr,
    NOISE: tl.constexpr,
    CUT: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < numel
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    small = at.to(tl.int32)
    row, column = small // columns, small % columns
    total = _total(update, grad, factor, at, row, column, inside, UPDATE, FACTOR)
    lost = decay
    if SHARE:
        one = tl.load(share)
        total = total * one
        lost = decay * one
    if not DECAY_LAST:
        w = w * (1.0 - lost)
    w = w - rate * total
    if DECAY_LAST:
        w = w * (1.0 - lost)
    if NOISE:
        bits = random_bits(at, key0, key1, base, start, width, stride, CUT)
        tl.store(weight + at, rounded_bfloat16(w, bits), mask=inside)
    else:
        tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*CHANGING, "num_rows"])
def _move_int8_kernel(
    codes,
    scales,
    update,
    grad,
    factor,
    num_rows,
    columns,
    num_groups,
    rate,
    decay,
    key0,
    key1,
    base,
    start,
    width,
    stride,
    UPDATE: tl.constexpr,
    FACTOR: tl.constexpr,
    DECAY_LAST: tl.constexpr,
    CUT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    column = group * GROUP + tl.arange(0, GROUP)[None, :]
    at = row[:, None] * columns + column
    inside = (row[:, None] < num_rows) & (column < columns)
    scale = tl.load(scales + row * num_groups + group, mask=row < num_rows, other=0.0)
    w = tl.load(codes + at, mask=inside, other=0).to(tl.float32) * scale[:, None]
    rows = row[:, None] + column * 0
    columns_of = column + row[:, None] * 0
    total = _total(update, grad, factor, at, rows, columns_of, inside, UPDATE, FACTOR)
    if not DECAY_LAST:
        w = w * (1.0 - decay)
    w = w - rate * total
    if DECAY_LAST:
        w = w * (1.0 - decay)
    w = tl.where(inside, w, 0.0)
    largest = tl.max(tl.abs(w), axis=1)
    largest = tl.where(tl.max((w != w).to(tl.int32), axis=1) > 0, float("nan"), largest)
    scale = tl.div_rn(largest, tl.zeros_like(largest) + 127.0)
    steps = tl.div_rn(w, tl.zeros_like(w) + tl.maximum(scale, SMALLEST)[:, None])
    bits = random_bits(at, key0, key1, base, start, width, stride, CUT)
    steps = tl.floor(steps + (bits >> 8).to(tl.float32) * 5.9604644775390625e-08)
    code = tl.minimum(tl.maximum(steps, -127.0), 127.0).to(tl.int8)
    tl.store(codes + at, code, mask=inside)
    tl.store(scales + row * num_groups + group, scale, mask=row < num_rows)


def move_(
    weight: Tensor,
    update: Tensor | None,
    *,
    rate: float,
    decay: float,
    decay_last: bool,
    key: Key | None,
    place: Place,
    grad: Tensor | None = None,
    factor: Tensor | None = None,
    share: Tensor | None = None,
) -> None:
    """W <- (1 - decay) W - rate (U + f o G), for contiguous W [rows, columns] or of any shape.

    `factor` float32: [1, 1], [rows, 1] or [1, columns]. `share`: a scalar on the device that
    multiplies rate and decay. A `key` rounds bf16 weights at random, else to nearest.
    """
    numel = weight.numel()
    launch(
        _move_kernel,
        (triton.cdiv(numel, ELEMENTS_A_PROGRAM),),
        (
            weight,
            weight if update is None else update,
            weight if grad is None else grad,
            weight if factor is None else factor,
            weight if share is None else share,
        ),
        numel,
        weight.shape[-1],
        rate,
        decay,
        *(key or (0, 0)),
        *place,
        update is not None,
        _factor_kind(factor),
        share is not None,
        decay_last,
        key is not None,
        place[2] > 0,
        ELEMENTS_A_PROGRAM,
        num_warps=NUM_WARPS,
        changing=slice(2, 10),
    )


def move_int8_(
    codes: Tensor,
    scales: Tensor,
    update: Tensor | None,
    *,
    rate: float,
    decay: float,
    decay_last: bool,
    key: Key,
    place: Place,
    grad: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """`move_` for codes int8 [rows, columns] with scales float32 [rows, groups], all contiguous."""
    num_rows, columns = codes.shape
    launch(
        _move_int8_kernel,
        (triton.cdiv(num_rows, ROWS_A_PROGRAM), scales.shape[1]),
        (
            codes,
            scales,
            scales if update is None else update,
            scales if grad is None else grad,
            scales if factor is None else factor,
        ),
        num_rows,
        columns,
        scales.shape[1],
        rate,
        decay,
        *key,
        *place,
        update is not None,
        _factor_kind(factor),
        decay_last,
        place[2] > 0,
        ROWS_A_PROGRAM,
        GROUP,
        num_warps=NUM_WARPS,
        changing=slice(3, 11),
    )


def _factor_kind(factor: Tensor | None) -> int:
    if factor is None:
        return 0
    rows, columns = factor.shape
    return 2 if rows > 1 else 3 if columns > 1 else 1
