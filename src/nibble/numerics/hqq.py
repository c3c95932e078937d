"""HQQ: integer codes of 1, 2, 3, 4 or 8 bits; zero points solved for a sparse error, then scales.

    q = clip(round(w / s + m + z), 0, 2^b - 1),    w ~ s (q - m - z),    m = (2^b - 1) / 2

First s is the block's range over 2^b - 1, and z minimises ||w - s (q - m - z)||_p^p with p < 1 by
half-quadratic splitting (Badri & Shaji, Half-Quadratic Quantization of Large Machine Learning
Models, Mobius Labs 2023):

    e = shrink(w - s (q - m - z)),   z = mean(q - m - (w - e) / s),   beta = kappa beta
    shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)

Then both are refitted to the codes by least squares and the codes to both, some rounds of what
Lloyd's algorithm does on an even grid (the library keeps the range, which is far too wide at few
bits):

    s = cov(q, w) / var(q),   z = mean(q) - m - mean(w) / s

Each block keeps the pair with the least mean |error| that it has met, so none is worse than plain
rounding; the library stops all blocks of a matrix at once. RMS error of a normal weight in blocks
of 64, ours and the library's: 1 bit 0.59 and 1.48, 2 bits 0.33 and 0.43, 3 bits 0.171 and 0.183, 4
bits 0.084 and 0.086.

p is 3/4 where the library has 0.7: |x|^(-1/4) is two square roots and a quotient, which round alike
everywhere, so that a slice of rows gives the same bits. Zero points are relative to the middle
code: near 0, float16 is fine-grained. They are float16 and scales bfloat16, at 8 bits both float32
(their rounding would be as large as the codes'); rounded in each round, so that the rest makes up
for it.

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
NUM_ZERO_ROUNDS = 10
NUM_FIT_ROUNDS = 10
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
        codes, scales, zeros = solve(
            blocks,
            bits=spec.bits,
            scale_dtype=tensors["scales"].dtype,
            zero_dtype=tensors["zeros"].dtype,
        )
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


def solve(
    blocks: Tensor, *, bits: int, scale_dtype: torch.dtype, zero_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of `blocks` float32 [..., block].

    Returns codes uint8 [..., block], scales [..., 1] and zeros [..., 1], the latter relative to the
    middle code, in float32 but exact in the types given.
    """
    levels = 2**bits - 1
    middle = levels / 2
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    floor = torch.maximum(low.abs(), high.abs()) / MAX_ZERO
    scales = _round_to(torch.maximum((high - low) / levels, floor), scale_dtype)
    scales = torch.where(scales > 0, scales, 1)
    # The lowest weight on code 0: plain rounding is the first guess.
    zeros = _round_to(-(low / scales) - middle, zero_dtype)
    best_scales, best_zeros = scales, zeros
    mean_weight = blocks.mean(dim=-1, keepdim=True)
    best_error = torch.full_like(scales, torch.inf)
    beta = BETA
    for index in range(NUM_ZERO_ROUNDS + NUM_FIT_ROUNDS):
        codes = _codes(blocks, scales, zeros + middle, levels)
        error = blocks - (codes - (zeros + middle)) * scales
        mean = error.abs().mean(dim=-1, keepdim=True)
        better = mean < best_error
        best_error = torch.where(better, mean, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
        if index < NUM_ZERO_ROUNDS:
            kept = _shrink(error, beta).sub_(blocks).div_(scales)
            centre = kept.add_(codes).mean(dim=-1, keepdim=True)
            beta *= KAPPA
        else:
            if index == NUM_ZERO_ROUNDS:  # the solver is done: go on from its best
                codes = _codes(blocks, best_scales, best_zeros + middle, levels)
            scales = _round_to(_least_squares(blocks, codes, best_scales, floor), scale_dtype)
            centre = codes.mean(dim=-1, keepdim=True) - mean_weight / scales
        zeros = _round_to(centre - middle, zero_dtype)
    codes = _codes(blocks, best_scales, best_zeros + middle, levels)
    return codes.to(torch.uint8), best_scales, best_zeros


def _codes(blocks: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> Tensor:
    return (blocks / scales).add_(zeros).round_().clamp_(0, levels)


def _shrink(error: Tensor, beta: float) -> Tensor:
    """sign(x) max(|x| - |x|^(-1/4) / beta, 0); at 0 the power is infinite and the clamp gives 0."""
    size = error.abs()
    return (size - size.sqrt().sqrt_().reciprocal_().div_(beta)).clamp_(min=0).copysign_(error)


def _least_squares(blocks: Tensor, codes: Tensor, fallback: Tensor, floor: Tensor) -> Tensor:
    """cov(codes, blocks) / var(codes); `fallback` where that is undefined or not above `floor`."""
    centred = codes - codes.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    scales = centred.mul_(blocks).mean(dim=-1, keepdim=True) / variance
    return torch.where((variance > 0) & (scales > floor), scales, fallback)


def _round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` rounded to `dtype`, still float32."""
    return values.to(dtype).to(torch.float32)


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
        codes: Tensor = (word.unsqueeze(2) >> shifts) & 7
        return codes.to(torch.uint8).flatten(1)
    shifts = torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(2) >> shifts) & (2**bits - 1)
    return codes.flatten(1)
