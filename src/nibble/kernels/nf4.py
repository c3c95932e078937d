"""nf4 and fp4 made dense by one Triton kernel, double-quantised scales included.

One program makes a tile of rows by words dense. A word is four bytes of codes, eight weights:
sixteen bytes of 16-bit output, one store a thread. The 16 values are read from a table of 64 bytes
that stays in the first cache; scales are decoded in registers, once a word. So the traffic is the
codes once and the output once, which is what a kernel of this kind can hope for. Shifts and masks
only, no division.
"""

# Triton's kernels are programs of their own language, and its decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.launch import launch
from nibble.numerics.nf4 import code_values
from nibble.spec.formats import SCALES_PER_STEP, FormatSpec

TILE_ROWS = 2
TILE_WORDS = 256
NUM_WARPS = 4


@triton.jit
def _unpack_kernel(
    codes,
    scales,
    steps,
    offsets,
    values,
    dense,
    num_rows,
    num_words,
    num_columns,
    num_scales,
    num_steps,
    BLOCK: tl.constexpr,
    DOUBLE: tl.constexpr,
    PER_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)[None, :]
    inside = (row < num_rows) & (word < num_words)
    packed = tl.load(codes + row * num_words + word, mask=inside, other=0)
    block = word // (BLOCK // 8)
    if DOUBLE:
        step = tl.load(steps + row * num_steps + block // PER_STEP, mask=inside, other=0.0)
        offset = tl.load(offsets + row * num_steps + block // PER_STEP, mask=inside, other=0.0)
        level = tl.load(scales + row * num_scales + block, mask=inside, other=0)
        root = level.to(tl.float32) * step + offset
        scale = root * root
    else:
        scale = tl.load(scales + row * num_scales + block, mask=inside, other=0.0)
    # Bytes lie lowest first in a word, and the first weight of a byte in its high nibble.
    lane = tl.arange(0, 8)[None, None, :]
    nibble = (packed[:, :, None] >> ((lane * 4) ^ 4)) & 15
    weight = tl.load(values + nibble) * scale[:, :, None]
    column = word[:, :, None] * 8 + lane
    target = dense + row[:, :, None] * num_columns + column
    written = inside[:, :, None] & (column < num_columns)
    tl.store(target, weight.to(dense.dtype.element_ty), mask=written)


@cache
def _values(name: str, device: torch.device) -> Tensor:
    """The 16 values on the device, copied there once: a copy a call would wait for the GPU."""
    return code_values(name, device)


def unpack(
    spec: FormatSpec, tensors: Mapping[str, Tensor], *, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Twin of `numerics.nf4.unpack`, on CUDA: `shape` is (rows, in), `tensors` any rows."""
    codes = tensors["codes"].contiguous().view(torch.int32)
    scales = tensors["scales"].contiguous()
    # Without double quantisation the kernel reads neither; it needs a pointer all the same.
    steps = tensors["scale_steps"].contiguous() if spec.double_quant else scales
    offsets = tensors["scale_offsets"].contiguous() if spec.double_quant else scales
    dense = torch.empty(shape, dtype=dtype, device=codes.device)
    grid = (triton.cdiv(shape[0], TILE_ROWS), triton.cdiv(codes.shape[1], TILE_WORDS))
    if dense.numel() == 0:
        return dense
    launch(
        _unpack_kernel,
        grid,
        (codes, scales, steps, offsets, _values(spec.name, dense.device), dense),
        shape[0],
        codes.shape[1],
        shape[1],
        scales.shape[1],
        steps.shape[1],
        spec.block,
        spec.double_quant,
        SCALES_PER_STEP,
        TILE_ROWS,
        TILE_WORDS,
        num_warps=NUM_WARPS,
    )
    return dense
