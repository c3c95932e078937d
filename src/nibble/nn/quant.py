"""A frozen linear whose weight is stored packed, in any format of `numerics/formats.py`.

    forward y = x W^T + b,   backward dL/dx = dL/dy W,   W = unpack(tensors), dropped at once

One module for all formats: what differs is the `FormatSpec`, a value. The packed tensors are
ordinary frozen parameters (`codes`, `scales`, ...), so state dicts, sharding, counting and moving
need nothing special; only their types are guarded, as `module.half()` would round fp32 scales. The
autograd function asks the module for them in both passes; in between no dense weight exists. A
format with a product of its own (int8's mixed one) uses it forward, and backward multiplies by the
dense weight, as LLM.int8 training does (Dettmers et al. 2022, arXiv 2208.07339, and QLoRA,
2305.14314).

An adapter's low-rank update is added by the same function (`nn/adapted.py`), so that neither its
output nor its share of dL/dx is ever a tensor of its own.

Costs: one unpacking in forward and one in backward, and one dense weight of scratch memory while
the product runs.

Weights and bias never get a gradient: what is trained is an adapter around this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nibble.errors import ConfigError, WeightError
from nibble.kernels import Choice, select, select_matmul
from nibble.nn.adapted import LowRank, adapted
from nibble.nn.targets import (
    head_names,
    replace_,
    require_all,
    stacked_parameters,
    tied_groups,
)
from nibble.numerics.formats import Matmul, Unpack, pack
from nibble.spec.formats import FormatSpec
from nibble.spec.names import covers

Self = TypeVar("Self", bound="QuantLinear")


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight that a checkpoint brings already packed: `tensors` as `spec.tensors(shape)` names
    them."""

    spec: FormatSpec
    tensors: Mapping[str, Tensor]


class QuantLinear(nn.Module):
    """x [..., in] to [..., out] by a packed weight [out, in]; frozen.

    Made on the meta device unless `device` says otherwise; `load_` fills it. `kernels` chooses who
    unpacks (`auto`, `eager`, ...); it is asked at the first use, when the device is known.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        spec: FormatSpec,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        kernels: Choice = "auto",
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.spec = spec
        self.kernels = kernels
        self.keeps_first = False
        """As `nn.adapted.Base` has it."""
        self._chosen: dict[str, tuple[Unpack, Matmul | None]] = {}
        stored = spec.tensors(self.shape)
        self._types: dict[str, torch.dtype] = {
            name: getattr(torch, tensor.dtype) for name, tensor in stored.items()
        }
        for name, tensor in stored.items():
            empty = torch.empty(tensor.shape, dtype=self._types[name], device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        held = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if held is None else nn.Parameter(held, requires_grad=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the dense weight."""
        return self.out_features, self.in_features

    def stored(self) -> dict[str, nn.Parameter]:
        """The parameters that hold the packed tensors; sharding may have them under other types."""
        return {name: self.get_parameter(name) for name in self._types}

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name, of the format's types: the parameters, or views of them."""
        held = {name: getattr(self, name) for name in self._types}
        return {
            name: tensor if tensor.dtype == dtype else tensor.detach().view(dtype)
            for (name, tensor), dtype in zip(held.items(), self._types.values(), strict=True)
        }

    def forward(self, x: Tensor, update: LowRank | None = None) -> Tensor:
        """[..., in] to [..., out], in the type of x; with an adapter's update added if given."""
        if update is None:
            result: Tensor = _FrozenLinear.apply(x, self)  # type: ignore[no-untyped-call]
            return result
        return adapted(x, [self], [update])[0]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantised weight [out, in], a fresh tensor without gradient."""
        return self._dense(self.packed(), dtype)

    @torch.no_grad()
    def load_(self, value: Tensor | PackedWeight) -> None:
        """Quantise a dense weight on the device of the packed tensors, or take packed ones as is.

        `value`: [out, in] of any float type on any device, or a PackedWeight of the same spec.
        Raises WeightError when it does not fit.
        """
        if isinstance(value, PackedWeight):
            tensors = self._checked(value)
        else:
            weight = value.to(self.get_parameter("codes").device)
            if tuple(weight.shape) != self.shape:
                raise WeightError(
                    f"a weight of shape {tuple(weight.shape)} does not fit a linear of shape "
                    f"{self.shape} (out, in); is the config of another model?"
                )
            tensors = pack(self.spec, weight)
        for name, parameter in self.packed().items():
            parameter.copy_(tensors[name])

    def _checked(self, value: PackedWeight) -> Mapping[str, Tensor]:
        """The tensors of `value`, after comparing format, names, shapes and types."""
        if value.spec != self.spec:
            raise WeightError(
                f"the checkpoint holds {value.spec}, the linear is to be stored as {self.spec}; "
                "set the quant section to the checkpoint's format"
            )
        for name, expected in self.spec.tensors(self.shape).items():
            given = value.tensors.get(name)
            stated = (expected.shape, getattr(torch, expected.dtype))
            if given is None or (tuple(given.shape), given.dtype) != stated:
                found = "absent" if given is None else f"{tuple(given.shape)} {given.dtype}"
                raise WeightError(
                    f"packed tensor {name} must be {expected.shape} {expected.dtype} for a linear "
                    f"of shape {self.shape}, but it is {found}"
                )
        return value.tensors

    def _dense(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        unpack, _ = self._functions(tensors["codes"].device)
        return unpack(self.spec, tensors, shape=self.shape, dtype=dtype)

    def product(self, x: Tensor) -> Tensor:
        """x W^T + b by the format's own product where it has one, else by the dense weight."""
        tensors = self.packed()
        _, matmul = self._functions(x.device)
        if matmul is not None:
            return matmul(self.spec, tensors, x, self.bias)
        product = F.linear(x, self._dense(tensors, x.dtype))
        return product if self.bias is None else product.add_(self.bias.to(x.dtype))

    def transposed_product(self, grad: Tensor, onto: Tensor | None = None) -> Tensor:
        """grad W, what flows back to the input; added to `onto` (2-D, in place) if given."""
        dense = self._dense(self.packed(), grad.dtype)
        return grad @ dense if onto is None else onto.addmm_(grad, dense)

    def _functions(self, device: torch.device) -> tuple[Unpack, Matmul | None]:
        if device.type not in self._chosen:
            self._chosen[device.type] = (
                select(self.spec, device=device, choice=self.kernels),
                select_matmul(self.spec, device=device, choice=self.kernels),
            )
        return self._chosen[device.type]

    def _apply(self: Self, fn: Any, recurse: bool = True) -> Self:
        """Move packed tensors with the module, but never let them change type (`half()`,
        `to(dtype)`)."""
        packed = list(self.stored().values())

        def guarded(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            if moved.dtype == tensor.dtype or not any(tensor is own for own in packed):
                return moved
            return tensor.to(moved.device)

        return super()._apply(guarded, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        named = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{named}, {self.spec.name}, {self.spec.bits} bits"


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b; nothing waits for backward, which asks the linear for its tensors again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantLinear) -> Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return ctx.linear.transposed_product(grad) if ctx.needs_input_grad[0] else None, None


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter may wrap `module`: a plain or a quantised linear."""
    return isinstance(module, nn.Linear | QuantLinear)


def dense_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] of a plain or quantised linear in `dtype`, without gradient.

    Of a plain linear that has this type already it is the weight itself: do not write to it.
    """
    if isinstance(linear, QuantLinear):
        return linear.dense(dtype)
    return linear.get_parameter("weight").detach().to(dtype)


def quantize_(
    model: nn.Module, spec: FormatSpec | None, *, keep: Sequence[str] = (), kernels: Choice = "auto"
) -> list[str]:
    """Replace the linears of a model on the meta device by QuantLinear and return their names.

    Left as they are: the output head, classification heads, linears with a tied weight, and what
    `keep` means by name, by last parts or by regular expression (a module's name covers all within
    it). `spec` None changes nothing. Raises ConfigError for a `keep` that means nothing, for
    experts held as 3-D parameters unless `keep` covers them, and when nothing is left.
    """
    if spec is None:
        return []
    linears = {n: module for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    stacks = list(stacked_parameters(model))
    require_all(keep, [*linears, *stacks], option="quant.keep")
    loose = [name for name in stacks if not covers(keep, name)]
    if loose:
        owner = loose[0].split(".")[-2:]
        raise ConfigError(
            f"{loose[0]} and {len(loose) - 1} others are stacks of experts, which "
            f"{spec.name} cannot store; keep them in 16 bit with quant.keep=[{owner[0]}]"
        )
    spared = head_names(model) | {n.rpartition(".")[0] for g in tied_groups(model) for n in g}
    names = [name for name in linears if name not in spared and not covers(keep, name)]
    if not names:
        raise ConfigError(
            f"quant.format={spec.name} finds no linear to store: the model has {len(linears)}, "
            "all of them heads or named in quant.keep; use quant.format=none or keep fewer"
        )
    for name in names:
        replace_(model, name, _quantized(linears[name], spec, kernels))
    return names


def _quantized(linear: nn.Linear, spec: FormatSpec, kernels: Choice) -> QuantLinear:
    weight, bias = linear.weight, linear.bias
    made = QuantLinear(
        linear.in_features,
        linear.out_features,
        spec=spec,
        bias=bias is not None,
        dtype=weight.dtype,
        kernels=kernels,
        device=weight.device,
    )
    if bias is not None:
        bias.requires_grad_(False)
        made.bias = bias
    if weight.device.type != "meta":
        made.load_(weight.detach())
    return made
