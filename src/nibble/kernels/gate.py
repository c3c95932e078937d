"""The gate of a feed-forward layer in Triton: act(gate) * up, and its gradients in place.

One kernel a pass: forward reads two tensors and writes one, backward reads three and writes the two
gradients where gate and up were, which nobody needs by then. So at the widest point of a block two
tensors of its largest size fewer are alive. Rows may lie apart (halves of one product).
"""

# Triton's kernels are programs of their own language, and its decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.launch import launch
from nibble.numerics.layer_functions import (
    GELU_CUBIC,
    GELU_SLOPE,
    INVERSE_ROOT_2,
    INVERSE_ROOT_2_PI,
    Activation,
)

TILE_ROWS = 2
TILE_COLUMNS = 1024
NUM_WARPS = 4
SLOPE = tl.constexpr(GELU_SLOPE)
CUBIC = tl.constexpr(GELU_CUBIC)
INVERSE_ROOT = tl.constexpr(INVERSE_ROOT_2)
INVERSE_ROOT_PI = tl.constexpr(INVERSE_ROOT_2_PI)
KINDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
"""The kernels' numbers of the activations."""


@triton.jit
def _share(x, KIND: tl.constexpr):
    """p(x) of act(x) = x p(x), in fp32."""
    if KIND == 0:
        share = tl.sigmoid(x)
    elif KIND == 1:
        share = tl.sigmoid(SLOPE * x * (1.0 + CUBIC * x * x))
    else:
        share = 0.5 * (1.0 + tl.erf(x * INVERSE_ROOT))
    return share


@triton.jit
def _bend(x, share, KIND: tl.constexpr):
    """x p'(x)."""
    if KIND == 0:
        bend = x * share * (1.0 - share)
    elif KIND == 1:
        bend = x * share * (1.0 - share) * (SLOPE * (1.0 + 3.0 * CUBIC * x * x))
    else:
        bend = x * INVERSE_ROOT_PI * tl.exp(-0.5 * x * x)
    return bend


@triton.jit
def _gate_kernel(
    gate,
    up,
    y,
    num_rows,
    num_columns,
    gate_row,
    up_row,
    KIND: tl.constexpr,
    HAS_UP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < num_columns)
    x = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    active = (x * _share(x, KIND)).to(gate.dtype.element_ty)
    if HAS_UP:
        factor = tl.load(up + row * up_row + column, mask=inside, other=0.0)
        active = active.to(tl.float32) * factor.to(tl.float32)
    tl.store(y + row * num_columns + column, active.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward_kernel(
    grad,
    gate,
    up,
    num_rows,
    num_columns,
    gate_row,
    up_row,
    KIND: tl.constexpr,
    HAS_UP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < num_columns)
    by_output = tl.load(grad + row * num_columns + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    share = _share(x, KIND)
    by_gate = share + _bend(x, share, KIND)
    by_active = by_output
    if HAS_UP:
        factor = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
        by_active = by_output * factor
        active = (x * share).to(gate.dtype.element_ty).to(tl.float32)
        by_up = by_output * active
        tl.store(up + row * up_row + column, by_up.to(up.dtype.element_ty), mask=inside)
    by_gate = by_active * by_gate
    tl.store(gate + row * gate_row + column, by_gate.to(gate.dtype.element_ty), mask=inside)


def gate(gate: Tensor, up: Tensor | None, *, activation: Activation) -> Tensor:
    """Twin of `numerics.layer_functions.gate`, on CUDA."""
    dtype = gate.dtype if up is None else torch.promote_types(gate.dtype, up.dtype)
    y = torch.empty(gate.shape, dtype=dtype, device=gate.device)
    if y.numel():
        gate_rows, up_rows = _rows(gate), _rows(gate if up is None else up)
        launch(
            _gate_kernel,
            _grid(gate_rows),
            (gate_rows, up_rows, y),
            *_numbers(gate_rows, up_rows),
            KINDS[activation],
            up is not None,
            TILE_ROWS,
            TILE_COLUMNS,
            num_warps=NUM_WARPS,
        )
    return y


def gate_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, *, activation: Activation
) -> tuple[Tensor, Tensor | None]:
    """Twin of `numerics.layer_functions.gate_backward`, on CUDA: the gradients are in `gate` and
    `up` themselves.
    """
    if gate.numel():
        gate_rows, up_rows = _rows(gate), _rows(gate if up is None else up)
        launch(
            _gate_backward_kernel,
            _grid(gate_rows),
            (grad.contiguous(), gate_rows, up_rows),
            *_numbers(gate_rows, up_rows),
            KINDS[activation],
            up is not None,
            TILE_ROWS,
            TILE_COLUMNS,
            num_warps=NUM_WARPS,
        )
    return gate, up


def _rows(x: Tensor) -> Tensor:
    """[..., F] as [rows, F] over the same memory."""
    return x.view(-1, x.shape[-1])


def _grid(rows: Tensor) -> tuple[int, int]:
    return triton.cdiv(rows.shape[0], TILE_ROWS), triton.cdiv(rows.shape[1], TILE_COLUMNS)


def _numbers(gate: Tensor, up: Tensor) -> tuple[int, int, int, int]:
    return gate.shape[0], gate.shape[1], gate.stride(0), up.stride(0)
