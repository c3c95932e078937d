"""Frozen linears with low-rank updates, alone or several that read the same input, as one autograd
function.

    forward    l = x' A^T,  A = [A_1; A_2; ...]         y_i = x W_i^T + b_i + s_i l_i B_i^T
    backward   g_l = [s_i g_i B_i]_i                    g_x = sum_i g_i W_i + g_l A
               g_A = g_l^T x',  g_B_i = s_i g_i^T l_i

x' is x or dropout(x). Updates are summed by the products that make them, so no tensor of the size
of an output exists twice; of several linears (q, k, v; gate, up) x is read once for all A, and the
sums over i happen inside the products instead of in autograd. x' and l wait for backward; dense
weights are made and dropped by the base, which is asked in both passes.

A and B are computed in the type of x and get gradients in their own: on CUDA the products write
fp32 directly. Casting them takes more host time than GPU time (six casts a linear and step where
activations are recomputed); `Casts` makes 16-bit copies of all adapters by a few launches at the
start of each forward pass, those of one group lying together. A copy is used only while the
parameter is the one that was copied, unchanged since; whatever is sharded or held elsewhere is cast
where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Base(Protocol):
    """A frozen linear [out, in], whatever it is stored as; it never gets a gradient."""

    @property
    def out_features(self) -> int: ...

    @property
    def keeps_first(self) -> bool:
        """Keep what backward needs before multiplying. A recomputation ends with the last tensor
        kept, so a block's last linear is then not multiplied again in vain."""

    def product(self, rows: Tensor) -> Tensor:
        """rows W^T + b, a fresh tensor."""

    def transposed_product(self, grad: Tensor, onto: Tensor | None = None) -> Tensor:
        """grad W, added to `onto` in place if given."""


@dataclass(frozen=True)
class PlainBase:
    """A frozen nn.Linear as `Base`."""

    linear: nn.Linear
    keeps_first: bool = False

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.linear.out_features

    def product(self, rows: Tensor) -> Tensor:
        """rows W^T + b."""
        return F.linear(rows, self.linear.weight, self.linear.bias)

    def transposed_product(self, grad: Tensor, onto: Tensor | None = None) -> Tensor:
        """grad W, added to `onto` if given."""
        weight = self.linear.weight
        return grad @ weight if onto is None else onto.addmm_(grad, weight)


class Casts:
    """Copies of adapters' parameters in the type that the model computes in.

    Of each group of modules the parameters of one name lie behind one another, `names` in order.
    """

    def __init__(self, groups: Iterable[Sequence[nn.Module]], *, names: Sequence[str]) -> None:
        self._owners = [(module, name) for group in groups for name in names for module in group]
        self._copies: dict[int, tuple[Tensor, Tensor, int]] = {}

    @torch.no_grad()
    def refresh(self, dtype: torch.dtype) -> None:
        """Copy all parameters that are plain tensors of another type; called as a forward pass
        begins."""
        owned = [getattr(module, name) for module, name in self._owners]
        plain: list[Tensor] = [
            p for p in owned if type(p) is nn.Parameter and p.dtype != dtype and p.numel()
        ]
        views = [view for p in plain if (view := self._view(p, dtype)) is not None]
        if len(views) != len(plain) or len(plain) != len(self._copies):
            views = _laid_out(plain, dtype)
        if plain:
            torch._foreach_copy_(views, plain)
        self._copies = {id(p): (p, v, p._version) for p, v in zip(plain, views, strict=True)}

    def _view(self, parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The memory of the parameter's copy, whatever it holds."""
        entry = self._copies.get(id(parameter))
        if entry is None or entry[0] is not parameter or entry[1].shape != parameter.shape:
            return None
        fits = entry[1].dtype == dtype and entry[1].device == parameter.device
        return entry[1] if fits else None

    def clear(self) -> None:
        """Give the copies' memory back."""
        self._copies = {}

    def of(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """The parameter in `dtype`: its copy while that is true to it, else a fresh cast."""
        view = self._view(parameter, dtype)
        if view is None or self._copies[id(parameter)][2] != parameter._version:
            return parameter.detach().to(dtype)
        return view

    def joined(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The parameters one below the other; a view where their copies lie so."""
        parts = [self.of(parameter, dtype) for parameter in parameters]
        first = parts[0]
        if all(
            one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
            and one.storage_offset() + one.numel() == other.storage_offset()
            for one, other in pairwise(parts)
        ):
            shape = (sum(part.shape[0] for part in parts), first.shape[1])
            return first.as_strided(shape, first.stride())
        return torch.cat(parts)


def _laid_out(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Uninitialised tensors of the parameters' shapes, one behind the other in one buffer."""
    if not parameters:
        return []
    sizes = [p.numel() for p in parameters]
    flat = torch.empty(sum(sizes), dtype=dtype, device=parameters[0].device)
    return [
        part.view(p.shape) for part, p in zip(torch.split(flat, sizes), parameters, strict=True)
    ]


NO_CASTS = Casts([], names=())


class LowRank(NamedTuple):
    """A trained update s B A of a frozen weight: y gains scaling * (x A^T) B^T.

    x: what the update sees, [..., in]; the linear's own input, or that with dropout. a: [r, in].
    b: [out, r]. They are computed in the type of x and get gradients in their own.
    """

    x: Tensor
    a: Tensor
    b: Tensor
    scaling: float
    casts: Casts = NO_CASTS


def adapted(x: Tensor, bases: Sequence[Base], updates: Sequence[LowRank]) -> tuple[Tensor, ...]:
    """The outputs [..., out_i] of linears that read the same x [..., in], each with its update.

    All updates must see the same tensor.
    """
    seen = updates[0].x
    keeps_first = len(bases) == 1 and bases[0].keeps_first
    held: list[Tensor] | None = [] if keeps_first and torch.is_grad_enabled() else None
    group = _Group(
        tuple(bases),
        tuple(update.scaling for update in updates),
        [update.a.shape[0] for update in updates],
        updates[0].casts,
    )
    factors = [update.a for update in updates] + [update.b for update in updates]
    made: tuple[Tensor, ...] = _Adapted.apply(  # type: ignore[no-untyped-call]
        x, None if seen is x else seen, group, held, *factors
    )
    if held is not None:
        made = (_Product.apply(made[0], held, group, updates[0].b),)  # type: ignore[no-untyped-call]
    return made


class _Group(NamedTuple):
    bases: tuple[Base, ...]
    scalings: tuple[float, ...]
    ranks: list[int]
    casts: Casts

    def outputs(self, rows: Tensor, low: Tensor, bs: Sequence[Tensor]) -> list[Tensor]:
        """Each base's product with its share of `low` brought to its width."""
        lows = torch.split(low, self.ranks, dim=1) if len(self.ranks) > 1 else (low,)
        return [
            base.product(rows).addmm_(part, self.casts.of(b, rows.dtype).t(), alpha=scaling)
            for base, part, b, scaling in zip(self.bases, lows, bs, self.scalings, strict=True)
        ]

    def a(self, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """All A below one another, [sum of ranks, in]."""
        if len(factors) == 1:
            return self.casts.of(factors[0], dtype)
        return self.casts.joined(factors, dtype)


class _Adapted(Function):
    """See the module. With `held` it gives an empty tensor of the output's shape, for `_Product`
    to fill."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seen: Tensor | None,
        group: _Group,
        held: list[Tensor] | None,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        seen_rows = rows if seen is None else seen.reshape(-1, seen.shape[-1])
        a, b = factors[: len(group.bases)], factors[len(group.bases) :]
        low = torch.mm(seen_rows, group.a(a, x.dtype).t())
        ctx.group, ctx.factors, ctx.shape, ctx.is_x = group, (a, b), x.shape, seen is None
        ctx.versions = [factor._version for factor in factors]
        ctx.save_for_backward(seen_rows, low)
        if held is not None:
            held += [rows, low]
            return (x.new_empty(1).expand(*x.shape[:-1], group.bases[0].out_features),)
        return tuple(y.view(*x.shape[:-1], -1) for y in group.outputs(rows, low, b))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        seen, low = ctx.saved_tensors
        group, (a, b) = ctx.group, ctx.factors
        assert ctx.versions == [f._version for f in (*a, *b)], "A or B changed before backward"
        needs_x, needs_seen = ctx.needs_input_grad[:2]
        rows = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_low = _grad_low(group, rows, b)
        grad_x = grad_seen = None
        if needs_x:
            for base, part in zip(group.bases, rows, strict=True):
                grad_x = base.transposed_product(part, grad_x)
            assert grad_x is not None
            if ctx.is_x:
                grad_x.addmm_(grad_low, group.a(a, grad_low.dtype))
            grad_x = grad_x.view(ctx.shape)
        if needs_seen:
            grad_seen = torch.mm(grad_low, group.a(a, grad_low.dtype)).view(ctx.shape)
        needed = ctx.needs_input_grad[4:]
        grads_a: Sequence[Tensor | None] = [None] * len(a)
        if any(needed[: len(a)]):
            grads_a = torch.split(_product_like(grad_low.t(), seen, a[0]), group.ranks)
        grads_b = [
            _product_like(part.t(), low_part, factor, scaling=scaling) if wanted else None
            for part, low_part, factor, scaling, wanted in zip(
                rows, torch.split(low, group.ranks, dim=1), b, group.scalings, needed[len(a) :],
                strict=True,
            )
        ]  # fmt: skip
        return grad_x, grad_seen, None, None, *grads_a, *grads_b


class _Product(Function):
    """The output of an `_Adapted` that gave an empty one of its shape; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, empty: Tensor, held: list[Tensor], group: _Group, b: Tensor) -> Tensor:
        rows, low = held
        (y,) = group.outputs(rows, low, [b])
        held.clear()
        return y.view(empty.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


def _grad_low(group: _Group, rows: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """[s_i g_i B_i]_i, each product written where it belongs."""
    dtype = rows[0].dtype
    grad_low = rows[0].new_empty(rows[0].shape[0], sum(group.ranks))
    parts = torch.split(grad_low, group.ranks, dim=1) if len(group.ranks) > 1 else (grad_low,)
    for part, row, factor, scaling in zip(parts, rows, b, group.scalings, strict=True):
        part.addmm_(row, group.casts.of(factor, dtype), beta=0, alpha=scaling)
    return grad_low


def _product_like(left: Tensor, right: Tensor, like: Tensor, *, scaling: float = 1.0) -> Tensor:
    """left right, in the type of `like`; where the vendor's product can, written in it at once."""
    direct = left.is_cuda and like.dtype == torch.float32 and left.dtype != torch.float32
    if direct:
        product = torch.mm(left, right, out_dtype=torch.float32)
    else:
        product = torch.mm(left, right).to(like.dtype)
    return product if scaling == 1.0 else product.mul_(scaling)


def rescaled_rows(direction: Tensor, gain: Tensor) -> Tensor:
    """direction (1 + gain) for `direction` [..., out] and fp32 `gain` [out]: DoRA's magnitudes.

    One function, because autograd would hold two products of the output's size at once in backward,
    and add the gain's gradient up in 16 bits.
    """
    scaled: Tensor = _RescaledRows.apply(direction, gain)  # type: ignore[no-untyped-call]
    return scaled


class _RescaledRows(Function):
    @staticmethod
    def forward(ctx: Any, direction: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(direction, gain)
        return torch.addcmul(direction, direction, gain.to(direction.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        direction, gain = ctx.saved_tensors
        tokens = tuple(range(grad.dim() - 1))
        grad_gain = (grad * direction).sum(tokens, dtype=gain.dtype)
        return torch.addcmul(grad, grad, gain.to(grad.dtype)), grad_gain
