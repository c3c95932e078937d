"""INT8 weights that are trained, made dense in Triton: codes are read and weights written once.

    w[i, j] = codes[i, j] * scales[i, j // 256]        in float32, rounded once to the wanted type

The same bits as numerics/int8_weights.py, without its float32 matrices in between: those would cost
eight times the memory traffic, in every forward and backward.
"""

# Triton's kernels are programs of their own language, and its decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.launch import launch
from nibble.spec.int8_weights import GROUP

ROWS_A_PROGRAM = 8
NUM_WARPS = 4


@triton.jit
def _decode_kernel(
    codes, scales, dense, num_rows, columns, num_groups, ROWS: tl.constexpr, GROUP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    column = group * GROUP + tl.arange(0, GROUP)[None, :]
    at = row[:, None] * columns + column
    inside = (row[:, None] < num_rows) & (column < columns)
    scale = tl.load(scales + row * num_groups + group, mask=row < num_rows, other=0.0)
    code = tl.load(codes + at, mask=inside, other=0).to(tl.float32)
    tl.store(dense + at, (code * scale[:, None]).to(dense.dtype.element_ty), mask=inside)


def decode(codes: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The weight [rows, columns] in `dtype`; codes int8 and scales float32 are contiguous."""
    num_rows, columns = codes.shape
    dense = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    launch(
        _decode_kernel,
        (triton.cdiv(num_rows, ROWS_A_PROGRAM), scales.shape[1]),
        (codes, scales, dense),
        num_rows,
        columns,
        scales.shape[1],
        ROWS_A_PROGRAM,
        GROUP,
        num_warps=NUM_WARPS,
    )
    return dense
