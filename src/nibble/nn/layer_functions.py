"""RMS norm, rotary embedding and gate as autograd functions over `kernels/layers.py`.

They keep as little as backward can do with: the norm its input (the weight is asked of its module
again, as with packed weights, so that whoever shards or streams it need not know), the rotary
embedding nothing but the angles that all layers share, the gate its two inputs, whose memory its
gradients may take: such a graph is walked once, and walking it again is an error, not a wrong
number. No second derivatives.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nibble.kernels.layers import layer_kernels
from nibble.numerics.layer_functions import Activation


def rms_norm(x: Tensor, module: nn.Module, *, eps: float, unit_offset: bool) -> Tensor:
    """The norm of the last dim of x with `module.weight`; see `numerics.layer_functions`."""
    weight = module.weight
    y: Tensor = _Norm.apply(x, weight, module, eps, unit_offset)  # type: ignore[no-untyped-call]
    return y


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [batch, tokens, heads, dim] turned by their positions, contiguous."""
    turned: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return turned


def gate(gate: Tensor, up: Tensor | None, *, activation: Activation) -> Tensor:
    """act(gate) * up; both belong to this function from now on."""
    y: Tensor = _Gate.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return y


def gate_pair(gate_up: Tensor, *, activation: Activation) -> Tensor:
    """The same of one tensor [..., 2 F] that holds gate and up side by side."""
    y: Tensor = _GatePair.apply(gate_up, activation)  # type: ignore[no-untyped-call]
    return y


class _Norm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, module: nn.Module, eps: float, unit_offset: bool
    ) -> Tensor:
        ctx.module, ctx.eps, ctx.unit_offset = module, eps, unit_offset
        ctx.save_for_backward(x)
        kernels = layer_kernels(x.device.type)
        return kernels.rms_norm(x, weight, eps=eps, unit_offset=unit_offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        weight, trained = ctx.module.weight, ctx.needs_input_grad[1]
        grad_x, grad_weight = layer_kernels(x.device.type).rms_norm_backward(
            grad, x, weight, eps=ctx.eps, unit_offset=ctx.unit_offset, trained=trained
        )
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_x, grad_weight, None, None, None


class _Rotary(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.cos, ctx.sin, ctx.dtypes = cos, sin, (q.dtype, k.dtype)
        return layer_kernels(q.device.type).rotate(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        turn = layer_kernels(grad_q.device.type).rotate
        q, k = turn(grad_q, grad_k, ctx.cos, ctx.sin, inverse=True)
        return q.to(ctx.dtypes[0]), k.to(ctx.dtypes[1]), None, None


class _Gate(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, activation: Activation) -> Tensor:
        ctx.activation, ctx.is_spent = activation, False
        ctx.save_for_backward(gate, up)
        return layer_kernels(gate.device.type).gate(gate, up, activation=activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = _spend(ctx)
        backward = layer_kernels(grad.device.type).gate_backward
        return (*backward(grad, gate, up, activation=ctx.activation), None)


class _GatePair(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: Activation) -> Tensor:
        ctx.activation, ctx.is_spent = activation, False
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return layer_kernels(gate.device.type).gate(gate, up, activation=activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = _spend(ctx)
        halves = gate_up.chunk(2, dim=-1)
        backward = layer_kernels(grad.device.type).gate_backward
        made = backward(grad, *halves, activation=ctx.activation)
        for half, value in zip(halves, made, strict=True):
            if value is not None and half is not value:
                half.copy_(value)
        return gate_up, None


def _spend(ctx: Any) -> tuple[Tensor, ...]:
    if ctx.is_spent:
        raise RuntimeError(
            "the graph of a fused feed-forward layer was walked twice: its gradients have taken "
            "the place of what it kept; compute the loss again, or set train.fused_kernels=false"
        )
    ctx.is_spent = True
    saved: tuple[Tensor, ...] = ctx.saved_tensors
    return saved
