"""AdamW on a parameter's moments as they are stored, in Triton: each number is read once.

Decode m and v, advance them, write U, encode m and v: 8-bit state never becomes a float tensor. The
code of a value is computed and not searched: its decade says how many codes there are, its place in
the decade which, and one look at the two edges beside it makes it exact, where a search would take
eight looks. Results are the eager ones up to contractions of products and sums into one rounding.
"""

# Triton's kernels are programs of their own language, and its decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.launch import launch
from nibble.kernels.noise import CHANGING, SMALLEST, Place, random_bits, rounded_bfloat16
from nibble.numerics import codec8
from nibble.numerics.rounding import Key
from nibble.spec.state import BLOCK

BLOCKS_A_PROGRAM = 4
NUM_WARPS = 4


@triton.jit
def _encoded(x, edges, SIGNED: tl.constexpr):
    """Codes and largest magnitudes of blocks [ROWS, 256] (numerics/codec8.py)."""
    absmax = tl.max(tl.abs(x), axis=1)
    absmax = tl.where(tl.max((x != x).to(tl.int32), axis=1) > 0, float("nan"), absmax)
    scaled = tl.div_rn(x, tl.zeros_like(x) + tl.maximum(absmax, SMALLEST)[:, None])
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


@triton.jit(do_not_specialize=[*CHANGING, "square_key0", "square_key1"])
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
        bits = random_bits(at, key0, key1, base, start, width, stride, CUT)
        tl.store(mean + at, rounded_bfloat16(m, bits), mask=inside)
        bits = random_bits(at, square_key0, square_key1, base, start, width, stride, CUT)
        tl.store(square + at, rounded_bfloat16(v, bits), mask=inside)
    else:
        tl.store(mean + at, m, mask=inside)
        tl.store(square + at, v, mask=inside)


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
    launch(
        _adamw_kernel,
        (triton.cdiv(num_blocks, BLOCKS_A_PROGRAM),),
        (grad, mean[0], mean[-1], square[0], square[-1], update, *tables),
        grad.numel(),
        betas[1],
        1 - betas[0],
        1 - betas[1],
        correction,
        eps,
        *key,
        *square_key,
        *place,
        is_coded,
        mean[0].dtype == torch.bfloat16,
        place[2] > 0,
        BLOCKS_A_PROGRAM,
        num_warps=NUM_WARPS,
        changing=slice(1, 14),
    )
