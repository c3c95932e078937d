"""A linear whose INT8 weight is trained, without a float copy of it anywhere.

    forward y = x W^T + b,   backward dL/dx = dL/dy W,  dL/dW = dL/dy^T x,   W = codes * scales

(Q-GaLore, arXiv 2407.08296.) Autograd wants a float parameter to give dL/dW to: `weight` is one
element seen as [out, in]. It takes gradients, hooks and a place in the optimiser, and its values
mean nothing; codes and scales are buffers, which an optimiser advances through
`optim.stores.keep_int8_`. So gradients are as large as a float weight's, and it is layer-wise mode
that makes them small.

Costs: one unpacking in forward and one in backward, each a dense weight of scratch. It does no
integer products, and is not the frozen int8 of nn/quant.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nibble.errors import ConfigError, WeightError
from nibble.kernels.steps import int8_decoder
from nibble.numerics import int8_weights
from nibble.numerics.rows import row_chunks


class Int8Linear(nn.Module):
    """x [..., in] to [..., out] by trained INT8 codes; made from a linear, rounded to nearest."""

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        dense = linear.weight.detach()
        parts = [
            int8_weights.encode(dense[rows], bits=None)
            for rows in row_chunks((self.out_features, self.in_features), dense.device)
        ]
        self.register_buffer("codes", torch.cat([codes for codes, _ in parts]))
        self.register_buffer("scales", torch.cat([scales for _, scales in parts]))
        self.weight = nn.Parameter(_stand_in(dense.new_zeros(()), (*dense.shape,)))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the type of x."""
        product: Tensor = _Product.apply(x, self.weight, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], a fresh tensor without gradient."""
        kernel = int8_decoder(self.codes.device.type)
        if kernel is not None:
            return kernel(self.codes, self.scales, dtype=dtype)
        dense = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        for rows in row_chunks((self.out_features, self.in_features), dense.device):
            dense[rows] = int8_weights.decode(self.codes[rows], self.scales[rows], dtype=dtype)
        return dense

    @torch.no_grad()
    def load_(self, value: Tensor) -> None:
        """Take the values of a float weight [out, in], rounded to nearest, some rows at a time.

        Raises WeightError for another shape.
        """
        if value.shape != self.codes.shape:
            raise WeightError(
                f"a weight of shape {list(value.shape)} does not fit an INT8 linear of "
                f"{list(self.codes.shape)}: config.json is of another model"
            )
        for rows in row_chunks((self.out_features, self.in_features), self.codes.device):
            codes, scales = int8_weights.encode(value[rows].to(self.codes.device), bits=None)
            self.codes[rows], self.scales[rows] = codes, scales

    def extra_repr(self) -> str:
        """Features, as nn.Linear shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Int8Linear:
        """Move without making the stand-in real, and without rounding the scales."""
        scales = self.scales
        self.weight.data = self.weight.data[:1, :1].clone()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight.data = _stand_in(self.weight.data.view(()), (*self.codes.shape,))
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "weight"]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        state_dict = {**state_dict, prefix + "weight": self.weight.data}
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def int8_linears_(model: nn.Module, pattern: str) -> list[str]:
    """Replace every nn.Linear whose name `pattern` is found in; returns their names.

    Raises ConfigError if there is none.
    """
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and re.search(pattern, name)
    ]
    if not names:
        raise ConfigError(f"the target {pattern!r} matches no linear of the model: name some")
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, Int8Linear(owner.get_submodule(child)))  # type: ignore[arg-type]
    return names


def _stand_in(element: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One element of memory in the shape of a matrix."""
    return element.expand(shape)


class _Product(torch.autograd.Function):
    """x W^T for the present codes, and the gradient of a weight that is not there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, linear: Int8Linear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.linear, ctx.dtype = linear, weight.dtype
        return F.linear(x, linear.dense(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        to_x = grad @ ctx.linear.dense(grad.dtype) if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (grad.flatten(0, -2).mT @ x.flatten(0, -2)).to(ctx.dtype)
        return to_x, to_weight, None
