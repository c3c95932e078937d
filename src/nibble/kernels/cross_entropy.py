"""Cross entropy in Triton: logits are read twice, overwritten by their gradient, and never copied.

A program takes one row: a pass for maximum and sum, which are corrected as larger values come
(Milakov & Gimelshein 2018, arXiv 1805.02867), and a pass for the gradient. Eager code reads and
writes an fp32 copy besides.
"""

# Triton's kernels are programs of their own language, and its decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.launch import launch

TILE_COLUMNS = 8192
NUM_WARPS = 8


@triton.jit
def _cross_entropy_kernel(
    logits,
    targets,
    losses,
    num_columns,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    NEED_GRAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * num_columns
    found = tl.load(targets + row)
    target = tl.maximum(found, 0)
    chosen = tl.load(start + target).to(tl.float32)
    largest = chosen
    others = 0.0
    for tile in range(TILES):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        value = tl.load(start + column, mask=column < num_columns, other=float("-inf"))
        value = tl.where(column == target, float("-inf"), value.to(tl.float32))
        higher = tl.maximum(largest, tl.max(value, axis=0))
        others = others * tl.exp(largest - higher) + tl.sum(tl.exp(value - higher), axis=0)
        largest = higher
    total = others + tl.exp(chosen - largest)
    loss = largest + tl.log(total) - chosen
    tl.store(losses + row, tl.where(found < 0, 0.0, loss))
    if NEED_GRAD:
        for tile in range(TILES):
            column = tile * COLUMNS + tl.arange(0, COLUMNS)
            inside = column < num_columns
            value = tl.load(start + column, mask=inside, other=float("-inf")).to(tl.float32)
            share = tl.where(column == target, -others, tl.exp(value - largest)) / total
            share = tl.where(found < 0, 0.0, share)
            tl.store(start + column, share.to(logits.dtype.element_ty), mask=inside)


def cross_entropy_(logits: Tensor, targets: Tensor, *, need_grad: bool) -> Tensor:
    """Twin of `numerics.cross_entropy.cross_entropy_`, on CUDA; `logits` must be contiguous."""
    assert logits.is_contiguous()
    num_rows, num_columns = logits.shape
    losses = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        columns = min(TILE_COLUMNS, triton.next_power_of_2(num_columns))
        launch(
            _cross_entropy_kernel,
            (num_rows,),
            (logits, targets.contiguous(), losses),
            num_columns,
            triton.cdiv(num_columns, columns),
            columns,
            need_grad,
            num_warps=NUM_WARPS,
        )
    return losses
