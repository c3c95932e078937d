"""Ternary weights made dense by one Triton kernel.

A program reads a tile of bytes once and writes the five planes of columns that they hold; the next
trit of a byte is its product with 3 modulo 256 (see `numerics/ternary.py`).
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
from nibble.spec.formats import TRITS_PER_BYTE, FormatSpec

TILE_BYTES = 512
NUM_WARPS = 2


@triton.jit
def _unpack_kernel(
    codes, scales, dense, num_eights, num_columns, TRITS: tl.constexpr, BYTES: tl.constexpr
):
    # Rows are whole eights of bytes: said so that the planes' stores are known to be aligned.
    num_bytes = num_eights * 8
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    rest = tl.load(codes + row * num_bytes + byte, mask=byte < num_bytes, other=0).to(tl.int32)
    scale = tl.load(scales + row)
    for plane in tl.static_range(TRITS):
        trit = ((rest * 3) >> 8) - 1
        rest = (rest * 3) & 255
        column = byte + plane * num_bytes
        weight = (trit.to(tl.float32) * scale).to(dense.dtype.element_ty)
        written = (byte < num_bytes) & (column < num_columns)
        tl.store(dense + row * num_columns + column, weight, mask=written)


def unpack(
    spec: FormatSpec, tensors: Mapping[str, Tensor], *, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Twin of `numerics.ternary.unpack`, on CUDA: `shape` is (rows, in), `tensors` any rows."""
    codes, scales = tensors["codes"].contiguous(), tensors["scales"].contiguous()
    dense = torch.empty(shape, dtype=dtype, device=codes.device)
    if dense.numel() == 0:
        return dense
    grid = (shape[0], triton.cdiv(codes.shape[1], TILE_BYTES))
    launch(
        _unpack_kernel,
        grid,
        (codes, scales, dense),
        codes.shape[1] // 8,
        shape[1],
        TRITS_PER_BYTE,
        TILE_BYTES,
        num_warps=NUM_WARPS,
    )
    return dense
