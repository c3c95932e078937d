"""HQQ: integer codes of 1, 2, 3, 4 or 8 bits whose zero points are solved for a sparse error.

    q = clip(round(w / s + z'), 0, 2^b - 1),    w ~ s (q - m - z),    m = (2^b - 1) / 2,  z' = m + z

s is the block's range over 2^b - 1 and stays; z minimises ||w - s (q - m - z)||_p^p with p < 1 by
half-quadratic splitting,

    e = shrink(w - s (q - m - z), beta),   z = mean(q - m - (w - e) / s),   beta = kappa beta
    shrink(x, beta) = sign(x) max(|x| - |x|^(p-1) / beta, 0)

(Badri & Shaji, Half-Quadratic Quantization of Large Machine Learning Models, Mobius Labs 2023.) p
is 3/4, where the library has 0.7: |x|^(-1/4) needs only square roots and a quotient, which round
alike everywhere, so a slice of rows gives the same bits; the error is no higher (tests). Each block
keeps the z with the least mean |error| it has met, so no block is worse than plain rounding; the
library stops all blocks at once. Zero points are stored relative to the middle code, near 0, where
float16 is fine-grained; scales as bfloat16, rounded before the solver runs, so that it makes up for
the rounding.

Codes lie in bytes, first value in the highest bits; at 3 bits 8 values fill 3 bytes (big-endian).
Costs: 20 rounds of some ten elementwise passes over a chunk of rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nibble.numerics.rows import padded_fp32, row_chunks
from nibble.spec.formats import FormatSpec

BETA = 10.0
KAPPA = 1.01
NUM_ROUNDS = 20
MAX_ZERO = 2048.0
"""Scales are at least max |w| / MAX_ZERO, so that float16 holds the zero points of any block."""


def pack(spec: FormatSpec, weight: Tensor) -> dict[str, Tensor]:
    """Quantise `weight` [out, in] to codes uint8, scales bfloat16 and zeros float16."""
    out, in_features = weight.shape
    length = spec.padded(in_features)
    tensors = {
        name: torch.empty(s.shape, dtype=getattr(torch, s.dtype), device=weight.device)
        for name, s in spec.tensors((out, in_features)).items()
    }
    for rows in row_chunks((out, length), weight.device):
        blocks = padded_fp32(weight[rows], length).view(-1, length // spec.block, spec.block)
        codes, scales, zeros = solve(blocks, bits=spec.bits)
        tensors["codes"][rows] = pack_bits(codes.flatten(1), bits=spec.bits)
        tensors["scales"][rows] = scales.squeeze(2)
        tensors["zeros"][rows] = zeros.squeeze(2)
    return tensors


def unpack(
    spec: FormatSpec, tensors: Mapping[str, Tensor], *, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The dense weight of `shape` (rows, in), in `dtype`; `tensors` may be any slice of rows."""
    middle = (2**spec.bits - 1) / 2
    length = spec.padded(shape[1])
    dense = torch.empty(shape, dtype=dtype, device=tensors["codes"].device)
    for rows in row_chunks((shape[0], length), dense.device):
        codes = unpack_bits(tensors["codes"][rows], bits=spec.bits)
        blocks = codes.to(torch.float32).view(-1, length // spec.block, spec.block)
        blocks -= tensors["zeros"][rows].to(torch.float32).unsqueeze(2) + middle
        blocks *= tensors["scales"][rows].to(torch.float32).unsqueeze(2)
        dense[rows] = blocks.flatten(1)[:, : shape[1]]
    return dense


def solve(blocks: Tensor, *, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of `blocks` float32 [..., block].

    Returns codes uint8 [..., block], scales bfloat16 [..., 1] and zeros float16 [..., 1], relative
    to the middle code.
    """
    levels = 2**bits - 1
    middle = levels / 2
    low, high = blocks.amin(dim=-1, keepdim=True), blocks.amax(dim=-1, keepdim=True)
    floor = torch.maximum(low.abs(), high.abs()) / MAX_ZERO
    scales = torch.maximum((high - low) / levels, floor).to(torch.bfloat16)
    scales = torch.where(scales > 0, scales, 1)
    step = scales.to(torch.float32)
    scaled = blocks / step
    # z' = -low / s puts the lowest weight on code 0: plain rounding, the solver's first guess.
    zeros = (-(low / step) - middle).to(torch.float16)
    best_zeros, best_error = zeros, torch.full_like(step, torch.inf)
    beta = BETA
    for _ in range(NUM_ROUNDS):
        zero = zeros.to(torch.float32) + middle
        codes = (scaled + zero).round_().clamp_(0, levels)
        error = (scaled - codes).add_(zero).mul_(step)
        size = error.abs()
        mean = size.mean(dim=-1, keepdim=True)
        better = mean < best_error
        best_error = torch.where(better, mean, best_error)
        best_zeros = torch.where(better, zeros, best_zeros)
        # shrink() with p = 3/4; where the error is 0 the quotient is infinite, the clamp gives 0.
        shrunk = (size - size.sqrt().sqrt_().reciprocal_().div_(beta)).clamp_(min=0)
        kept = shrunk.copysign_(error).div_(step)
        zeros = (codes.sub_(scaled).add_(kept).mean(dim=-1, keepdim=True) - middle).to(
            torch.float16
        )
        beta *= KAPPA
    codes = (scaled + (best_zeros.to(torch.float32) + middle)).round_().clamp_(0, levels)
    return codes.to(torch.uint8), scales, best_zeros


def pack_bits(codes: Tensor, *, bits: int) -> Tensor:
    """Codes below 2^bits, uint8 [rows, n], n a multiple of 8, to bytes uint8 [rows, n bits / 8]."""
    if bits == 8:
        return codes
    if bits == 3:
        word = torch.zeros(
            codes.shape[0], codes.shape[1] // 8, dtype=torch.int32, device=codes.device
        )
        for index in range(8):
            word |= codes[:, index::8].to(torch.int32) << (21 - 3 * index)
        parts = torch.stack((word >> 16, word >> 8, word), dim=2)
        return (parts & 255).to(torch.uint8).flatten(1)
    per_byte = 8 // bits
    packed = torch.zeros(
        codes.shape[0], codes.shape[1] // per_byte, dtype=torch.uint8, device=codes.device
    )
    for index in range(per_byte):
        packed |= codes[:, index::per_byte] << (8 - bits * (index + 1))
    return packed


def unpack_bits(packed: Tensor, *, bits: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [rows, n]."""
    if bits == 8:
        return packed
    if bits == 3:
        parts = packed.view(packed.shape[0], -1, 3).to(torch.int32)
        word = (parts[..., 0] << 16) | (parts[..., 1] << 8) | parts[..., 2]
        shifts = torch.arange(21, -1, -3, dtype=torch.int32, device=packed.device)
        return ((word.unsqueeze(2) >> shifts) & 7).to(torch.uint8).flatten(1)
    shifts = torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(2) >> shifts) & (2**bits - 1)
    return codes.flatten(1)
