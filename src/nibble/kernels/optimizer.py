"""Steps of an optimiser in Triton: each number of state, gradient and weight is read once.

    adamw_       decode m and v, advance them, write U, encode m and v; 8-bit state never becomes a
                 float tensor. 2 x (1 + 1) bytes of state, gradient and update an element, no more
    move_        W <- (1 - decay) W - rate (U + f o G), rounded at random, in one pass
    move_int8_   the same for INT8 codes with a scale for each 256 of a row

Noise is the hash of numerics/rounding.py of an element's number, so results are the eager ones up
to contractions of products and sums into one rounding. The code of a value is computed and not
searched: its decade says how many codes there are, its place in the decade which, and one look at
the two edges beside it makes it exact, where a search would take eight looks.
"""

# Triton's kernels are programs of their own language, and its decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.numerics import codec8
from nibble.numerics.rounding import Key
from nibble.spec.int8_weights import GROUP
from nibble.spec.state import BLOCK

BLOCKS_A_PROGRAM = 4
ELEMENTS_A_PROGRAM = 2048
NUM_WARPS = 4
Place = tuple[int, int, int, int]
"""base, start, width, stride: element i is number base + (i + start) // width * stride +
(i + start) % width; width 0: base + start + i."""
_SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
_CHANGING = ["numel", "rate", "decay", "key0", "key1", "base", "start", "width", "stride"]


@triton.jit
def _random_bits(element, key0, key1, base, start, width, stride, CUT: tl.constexpr):
    at = element.to(tl.int64) + start
    if CUT:
        at = at // width * stride + at % width
    word = (at + base).to(tl.uint32) * 0x9E3779B1 + key0.to(tl.uint32)
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D
    word = word ^ (word >> 15)
    word = word ^ key1.to(tl.uint32)
    word = word * 0x846CA68B
    word = word ^ (word >> 16)
    word = word * 0x9E3779B1
    return word ^ (word >> 15)


@triton.jit
def _rounded_bfloat16(x, bits):
    noisy = (x.to(tl.uint32, bitcast=True) + (bits >> 16)) & 0xFFFF0000
    # Infinities and NaN have all exponent bits set, and stay.
    is_finite = (x.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000
    return tl.where(is_finite, noisy.to(tl.float32, bitcast=True), x).to(tl.bfloat16)


@triton.jit
def _encoded(x, edges, SIGNED: tl.constexpr):
    """Codes and largest magnitudes of blocks [ROWS, 256] (numerics/codec8.py)."""
    absmax = tl.max(tl.abs(x), axis=1)
    absmax = tl.where(tl.max((x != x).to(tl.int32), axis=1) > 0, float("nan"), absmax)
    scaled = tl.div_rn(x, tl.zeros_like(x) + tl.maximum(absmax, _SMALLEST)[:, None])
    # No code means NaN: absmax says it, for the whole block.
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    size = tl.abs(scaled)
    decade = (size < 1e-1).to(tl.int32) + (size < 1e-2).to(tl.int32) + (size < 1e-3).to(tl.int32)
    decade += (size < 1e-4).to(tl.int32) + (size < 1e-5).to(tl.int32) + (size < 1e-6).to(tl.int32)
    whole = tl.exp2(decade.to(tl.float32) * 3.321928094887362) * size
    num_codes = (64 if SIGNED else 128) >> decade
    cell = ((whole - 0.1) * (num_codes.to(tl.float32) * 1.1111111)).to(tl.int32)
    cell = num_codes + tl.minimum(tl.maximum(cell, 0), num_codes - 1)
    code = tl.where(scaled < 0, 127 - cell, 127 + cell) if SIGNED else cell - 1
    # The code above all edges that are below the value, of which this is one or a neighbour.
    above = scaled > tl.load(edges + tl.minimum(code, 254))
    below = scaled <= tl.load(edges + tl.maximum(code - 1, 0))
    code += tl.where(above & (code < 255), 1, 0) - tl.where(below & (code > 0) & ~above, 1, 0)
    return code.to(tl.uint8), absmax


@triton.jit(do_not_specialize=[*_CHANGING, "square_key0", "square_key1"])
def _adamw_kernel(
    grad,
    mean,
    mean_max,
    square,
    square_max,
    update,
    signed_values,
    signed_edges,
    values,
    edges,
    numel,
    beta2,
    weight1,
    weight2,
    correction,
    eps,
    key0,
    key1,
    square_key0,
    square_key1,
    base,
    start,
    width,
    stride,
    CODED: tl.constexpr,
    NOISE: tl.constexpr,
    CUT: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = at < numel
    is_block = block * 256 < numel
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if CODED:
        scale = tl.load(mean_max + block, mask=is_block, other=0.0)
        m = tl.load(signed_values + tl.load(mean + at, mask=inside, other=127).to(tl.int32))
        m = m * scale[:, None]
        scale = tl.load(square_max + block, mask=is_block, other=0.0)
        v = tl.load(values + tl.load(square + at, mask=inside, other=0).to(tl.int32))
        v = v * scale[:, None]
    else:
        m = tl.load(mean + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(square + at, mask=inside, other=0.0).to(tl.float32)
    m = m + weight1 * (g - m)
    v = v * beta2 + weight2 * (g * g)
    u = tl.div_rn(m, tl.sqrt_rn(v) * correction + eps)
    tl.store(update + at, u.to(update.dtype.element_ty), mask=inside)
    if CODED:
        code, absmax = _encoded(m, signed_edges, True)
        tl.store(mean + at, code, mask=inside)
        tl.store(mean_max + block, absmax, mask=is_block)
        code, absmax = _encoded(v, edges, False)
        tl.store(square + at, code, mask=inside)
        tl.store(square_max + block, absmax, mask=is_block)
    elif NOISE:
        bits = _random_bits(at, key0, key1, base, start, width, stride, CUT)
        tl.store(mean + at, _rounded_bfloat16(m, bits), mask=inside)
        bits = _random_bits(at, square_key0, square_key1, base, start, width, stride, CUT)
        tl.store(square + at, _rounded_bfloat16(v, bits), mask=inside)
    else:
        tl.store(mean + at, m, mask=inside)
        tl.store(square + at, v, mask=inside)


@triton.jit
def _total(
    update, grad, factor, at, row, column, inside, UPDATE: tl.constexpr, FACTOR: tl.constexpr
):
    """U + f o G at some elements; FACTOR 0: no G, 1: one f, 2: one a row, 3: one a column."""
    total = tl.zeros(at.shape, dtype=tl.float32)
    if UPDATE:
        total += tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
    if FACTOR > 0:
        which = row if FACTOR == 2 else column
        if FACTOR == 1:
            which = at * 0
        f = tl.load(factor + which, mask=inside, other=0.0)
        total += tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * f
    return total


@triton.jit(do_not_specialize=_CHANGING)
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
    total = _total(update, grad, factor, at, at // columns, at % columns, inside, UPDATE, FACTOR)
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
        bits = _random_bits(at, key0, key1, base, start, width, stride, CUT)
        tl.store(weight + at, _rounded_bfloat16(w, bits), mask=inside)
    else:
        tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_CHANGING, "num_rows"])
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
    steps = tl.div_rn(w, tl.zeros_like(w) + tl.maximum(scale, _SMALLEST)[:, None])
    bits = _random_bits(at, key0, key1, base, start, width, stride, CUT)
    steps = tl.floor(steps + (bits >> 8).to(tl.float32) * 5.9604644775390625e-08)
    code = tl.minimum(tl.maximum(steps, -127.0), 127.0).to(tl.int8)
    tl.store(codes + at, code, mask=inside)
    tl.store(scales + row * num_groups + group, scale, mask=row < num_rows)


@cache
def _tables(device: torch.device) -> tuple[Tensor, ...]:
    """Values and edges of the signed and of the unsigned map, on the device."""
    return (*codec8.tables(True, device), *codec8.tables(False, device))


def adamw_(
    grad: Tensor,
    mean: tuple[Tensor, ...],
    square: tuple[Tensor, ...],
    update: Tensor,
    *,
    betas: tuple[float, float],
    correction: float,
    eps: float,
    keys: tuple[Key, Key] | None,
    place: Place,
) -> None:
    """Advance one parameter's moments, as stored, and write U = m / (sqrt(v) correction + eps).

    All tensors are contiguous and of one size; `keys` round bf16 moments at random.
    """
    is_coded = len(mean) == 2
    key, square_key = keys or ((0, 0), (0, 0))
    tables = _tables(grad.device) if is_coded else (grad,) * 4
    num_blocks = triton.cdiv(grad.numel(), BLOCK)
    _adamw_kernel[(triton.cdiv(num_blocks, BLOCKS_A_PROGRAM),)](
        grad,
        mean[0],
        mean[-1],
        square[0],
        square[-1],
        update,
        *tables,
        grad.numel(),
        betas[1],
        1 - betas[0],
        1 - betas[1],
        correction,
        eps,
        *key,
        *square_key,
        *place,
        CODED=is_coded,
        NOISE=mean[0].dtype == torch.bfloat16,
        CUT=place[2] > 0,
        ROWS=BLOCKS_A_PROGRAM,
        num_warps=NUM_WARPS,
    )


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
    _move_kernel[(triton.cdiv(numel, ELEMENTS_A_PROGRAM),)](
        weight,
        weight if update is None else update,
        weight if grad is None else grad,
        weight if factor is None else factor,
        weight if share is None else share,
        numel,
        weight.shape[-1],
        rate,
        decay,
        *(key or (0, 0)),
        *place,
        UPDATE=update is not None,
        FACTOR=_factor_kind(factor),
        SHARE=share is not None,
        DECAY_LAST=decay_last,
        NOISE=key is not None,
        CUT=place[2] > 0,
        ELEMENTS=ELEMENTS_A_PROGRAM,
        num_warps=NUM_WARPS,
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
    rows = 4
    _move_int8_kernel[(triton.cdiv(num_rows, rows), scales.shape[1])](
        codes,
        scales,
        scales if update is None else update,
        scales if grad is None else grad,
        scales if factor is None else factor,
        num_rows,
        columns,
        scales.shape[1],
        rate,
        decay,
        *key,
        *place,
        UPDATE=update is not None,
        FACTOR=_factor_kind(factor),
        DECAY_LAST=decay_last,
        CUT=place[2] > 0,
        ROWS=rows,
        GROUP=GROUP,
        num_warps=NUM_WARPS,
    )


def _factor_kind(factor: Tensor | None) -> int:
    if factor is None:
        return 0
    rows, columns = factor.shape
    return 2 if rows > 1 else 3 if columns > 1 else 1
