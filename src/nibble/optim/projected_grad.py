"""A gradient of which only the projection is kept, in the place where torch keeps gradients.

`param.grad` must have the parameter's shape. This tensor has it and one element of storage: the
small matrix lies beside it. So whoever takes norms of gradients, scales them or drops them
(`torch.nn.utils.clip_grad_norm_`, `zero_grad`, a trainer's logs) finds the small one, whose norm is
the norm of what the update will be made of, |P^T G| <= |G|.

Only norms, scaling by a scalar and questions of shape and type are answered; anything else is an
error, since there is no full gradient to give.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class ProjectedGrad(Tensor):
    """Stands for the gradient of a parameter and holds `small`, its projection.

    `sketches` has, by side, what the next basis will be made of; empty if none is due. A `spent`
    one has been stepped with already: only its norm is left, for reports.
    """

    small: Tensor
    sketches: dict[str, Tensor]
    spent: bool

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ProjectedGrad({list(self.small.shape)} for {list(self.shape)})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SCALING and any(is_spent(grad) for grad in _each(args[0])):
            raise RuntimeError(
                "gradients were scaled after their parameters had stepped in backward: do not "
                "clip, and scale the loss, or step after backward"
            )
        if func in _ON_LISTS:
            tensors = [part for grad in args[0] for part in _parts(grad, func is _FOREACH_NORM)]
            return func(tensors, *args[1:], **kwargs)
        if func in _ON_SMALL and isinstance(args[0], ProjectedGrad):
            return func(args[0].small, *args[1:], **kwargs)
        if func in _IN_PLACE and isinstance(args[0], ProjectedGrad):
            for tensor in _parts(args[0], False):
                func(tensor, *args[1:], **kwargs)
            return args[0]
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        # No TypeError: an operator's would be taken as "try the other operand" and lose its words.
        name = getattr(func, "__qualname__", repr(func))
        raise RuntimeError(
            f"{name} of a gradient that is kept only as its projection: a layer-wise optimiser "
            "leaves no full gradient; take norms, or use the ordinary optimiser"
        )


def is_spent(grad: Tensor) -> bool:
    """Whether the parameter has stepped with this gradient already."""
    return isinstance(grad, ProjectedGrad) and grad.spent


def projected_grad(
    like: Tensor, *, small: Tensor, sketches: dict[str, Tensor], spent: bool = False
) -> ProjectedGrad:
    """A stand-in for the gradient of the parameter `like`, NaN to whoever looks into it."""
    nothing = torch.full((), float("nan"), dtype=like.dtype, device=like.device)
    grad = nothing.expand(like.shape).as_subclass(ProjectedGrad)
    grad.small, grad.sketches, grad.spent = small, sketches, spent
    return grad


_ABSENT: Any = WeakTensorKeyDictionary()


def register_absent(param: Tensor, make: Callable[[Tensor], ProjectedGrad] | None) -> None:
    """Say by which method the gradient of nothing is made for a parameter; None: it is whole again.

    The method is held weakly: its owner knows the parameter, and a table that kept the owner would
    keep model and state for as long as the process lives.
    """
    if make is None:
        _ABSENT.pop(param, None)
    else:
        _ABSENT[param] = weakref.WeakMethod(make)


def absent_grad(param: Tensor) -> Tensor:
    """The gradient of a parameter that this process did not use: zeros of the shapes that it has on
    the others, whole or small, with sketches exactly when a new basis is due.
    """
    method = _ABSENT.get(param)
    make = None if method is None else method()
    return torch.zeros_like(param) if make is None else make(param)


def small_tensors(params: Iterable[Tensor]) -> list[Tensor]:
    """What is to be summed over ranks in place of gradients: projections and sketches, in order.

    Ranks whose parameters, options and seeds are equal have equal bases and so equal shapes here,
    and sums of these make the step of the sum of their batches. Gradients that are whole are not
    among them. Raises RuntimeError where parameters have stepped in backward, before any sum.
    """
    params = list(params)
    if any(param.grad is not None and is_spent(param.grad) for param in params):
        raise RuntimeError(
            "gradients are summed over processes after backward, and stepping in backward does not "
            "wait for it: use one process, or in_backward=false"
        )
    return [
        part
        for param in params
        if isinstance(param.grad, ProjectedGrad)
        for part in _parts(param.grad, False)
    ]


def _each(grads: Any) -> Iterable[Tensor]:
    return (grads,) if isinstance(grads, Tensor) else grads


def _parts(grad: Tensor, only_small: bool) -> list[Tensor]:
    """The tensors that a gradient consists of."""
    if not isinstance(grad, ProjectedGrad):
        return [grad]
    return [grad.small] if only_small else [grad.small, *grad.sketches.values()]


_FOREACH_NORM = torch._foreach_norm
_ON_LISTS: set[Any] = {_FOREACH_NORM, torch._foreach_mul_, torch._foreach_zero_}
_ON_SMALL: set[Any] = {
    torch.linalg.vector_norm,
    torch.norm,
    Tensor.norm,
    torch.isfinite,
    torch.isnan,
    Tensor.isnan,
    Tensor.isfinite,
}
_IN_PLACE: set[Any] = {Tensor.mul_, Tensor.div_, Tensor.zero_}
_SCALING: set[Any] = {torch._foreach_mul_, Tensor.mul_, Tensor.div_}
_QUESTIONS: set[Any] = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.requires_grad_,
    *(
        getattr(Tensor, name).__get__
        for name in (
            "shape",
            "dtype",
            "device",
            "layout",
            "is_sparse",
            "is_cuda",
            "requires_grad",
            "grad_fn",
            "is_leaf",
            "nbytes",
            "itemsize",
            "ndim",
            "is_quantized",
            "is_meta",
        )
    ),
}
