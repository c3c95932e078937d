"""hqq at 1, 2, 3, 4 and 8 bits made dense by one Triton kernel.

    w = s (q - m - z),   m = (2^bits - 1) / 2

One program makes a tile of rows by words dense: a word is four bytes (3 bits: three bytes) and
holds 32 / bits weights (3 bits: eight). Scales and zero points are read once a word. Codes in,
weights out: no other traffic.
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
from nibble.spec.formats import FormatSpec

TILE_ROWS = 2
TILE_WEIGHTS = 2048
NUM_WARPS = 4


@triton.jit
def _unpack_kernel(
    codes,
    scales,
    zeros,
    dense,
    num_rows,
    num_words,
    num_columns,
    num_scales,
    BITS: tl.constexpr,
    PER_WORD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)[None, :]
    inside = (row < num_rows) & (word < num_words)
    lane = tl.arange(0, PER_WORD)[None, None, :]
    if BITS == 3:
        first = codes + (row * num_words + word) * 3
        high = tl.load(first, mask=inside, other=0).to(tl.int32)
        middle = tl.load(first + 1, mask=inside, other=0).to(tl.int32)
        low = tl.load(first + 2, mask=inside, other=0).to(tl.int32)
        packed = (high << 16) | (middle << 8) | low
        shift = 21 - lane * 3
    else:
        packed = tl.load(codes + row * num_words + word, mask=inside, other=0)
        # Bytes lie lowest first in a word, values highest first in a byte.
        shift = (lane * BITS) ^ (8 - BITS)
    level = (packed[:, :, None] >> shift) & ((1 << BITS) - 1)
    column = word[:, :, None] * PER_WORD + lane
    if PER_WORD > BLOCK:  # 1 bit in blocks of 16: a word spans two
        block = column // BLOCK
        at = row[:, :, None] * num_scales + block
        covered = inside[:, :, None] & (block < num_scales)
        scale = tl.load(scales + at, mask=covered, other=0.0).to(tl.float32)
        zero = tl.load(zeros + at, mask=covered, other=0.0).to(tl.float32)
    else:
        at = row * num_scales + word // (BLOCK // PER_WORD)
        scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)[:, :, None]
        zero = tl.load(zeros + at, mask=inside, other=0.0).to(tl.float32)[:, :, None]
    weight = (level.to(tl.float32) - (zero + ((1 << BITS) - 1) * 0.5)) * scale
    target = dense + row[:, :, None] * num_columns + column
    written = inside[:, :, None] & (column < num_columns)
    tl.store(target, weight.to(dense.dtype.element_ty), mask=written)


def unpack(
    spec: FormatSpec, tensors: Mapping[str, Tensor], *, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Twin of `numerics.hqq.unpack`, on CUDA: `shape` is (rows, in), `tensors` any rows."""
    codes = tensors["codes"].contiguous()
    scales = tensors["scales"].contiguous()
    zeros = tensors["zeros"].contiguous()
    per_word = 8 if spec.bits == 3 else 32 // spec.bits
    num_words = -(-codes.shape[1] // (3 if spec.bits == 3 else 4))
    if spec.bits == 1 and codes.shape[1] % 4:  # rows of two bytes more than whole words
        codes = _padded_to_words(codes, num_words)
    if spec.bits != 3:
        codes = codes.view(torch.int32)
    dense = torch.empty(shape, dtype=dtype, device=codes.device)
    if dense.numel() == 0:
        return dense
    tile_words = TILE_WEIGHTS // per_word
    grid = (triton.cdiv(shape[0], TILE_ROWS), triton.cdiv(num_words, tile_words))
    launch(
        _unpack_kernel,
        grid,
        (codes, scales, zeros, dense),
        shape[0],
        num_words,
        shape[1],
        scales.shape[1],
        spec.bits,
        per_word,
        spec.block,
        TILE_ROWS,
        tile_words,
        num_warps=NUM_WARPS,
    )
    return dense


def _padded_to_words(codes: Tensor, num_words: int) -> Tensor:
    padded = codes.new_zeros(codes.shape[0], num_words * 4)
    padded[:, : codes.shape[1]] = codes
    return padded
