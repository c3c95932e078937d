"""Update rules: from gradients and state to the direction in which weights go.

A rule is a function (gradients, states, hyper) -> updates U, and the caller applies

    W <- (1 - lr * weight_decay) * W - lr * U

so learning rate and (decoupled, arXiv 1711.05101) weight decay are no business of a rule, and
neither are parameters, codecs or devices: whatever changes the gradient before, or U after, can
stand between caller and rule. Everything is a *list* of float32 tensors, taken through
`torch._foreach_*`, so that hundreds of small tensors cost a handful of kernel launches.

    adamw      M = b1 M + (1-b1) G;  V = b2 V + (1-b2) G^2;
               U = M/(1-b1^t) / (sqrt(V/(1-b2^t)) + eps)                    (arXiv 1412.6980)
               bias correction "step": sqrt(1-b2^t)/(1-b1^t) M / (sqrt(V) + eps), the form at the
               end of that paper's section 2; "none": M / (sqrt(V) + eps)
    sgd        U = G
    momentum   M = mu M + G;  U = M                                      (torch.optim.SGD's form)
    lion       U = sign(b1 M + (1-b1) G);  M = b2 M + (1-b2) G                  (arXiv 2302.06675)
    adafactor  R, C = running row and column means of G^2 + eps^2 with b2_t = 1 - t^-0.8;
               U = G / sqrt(R C^T / mean(R)), divided by max(1, rms(U) / 1.0)   (arXiv 1804.04235)
    adafactor_momentum    M = b1 M + (1-b1) U;  U = M, with adafactor's U     (the same, section 5)

Adafactor is the paper's with an external learning rate: transformers' Adafactor with
`relative_step=False, scale_parameter=False` and its eps[0] = eps^2 (here eps is in units of the
gradient, as Adam's is). torch.optim.Adafactor scales the step by the weights' RMS; this does not.

States advance in place (hence the `_`); gradients are only read; updates may be the very tensors
given as gradients or states, so they are to be read before the next call and not written. Costs two
temporaries of the gradients' size at most; of large gradients adafactor may be given some rows at
a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

ADAFACTOR_DECAY = 0.8
ADAFACTOR_CLIP = 1.0

States = Mapping[str, list[Tensor]]
"""Slot name to one float32 tensor for each gradient, in the same order."""


BIAS_CORRECTIONS = ("both", "step", "none")


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """Numbers that rules use; `step` counts from 1 and includes the present update.

    `bias_correction` is adamw's: of both moments, as a factor of the step (eps is not corrected),
    or none.
    """

    step: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    bias_correction: str = "both"

    def denominator(self) -> tuple[float, float]:
        """(c, e) of adamw's U = M / (c sqrt(V) + e): both corrections in one pass over memory."""
        if self.bias_correction == "none":
            return 1.0, self.eps
        correction1 = 1 - self.betas[0] ** self.step
        ratio = correction1 / math.sqrt(1 - self.betas[1] ** self.step)
        return ratio, self.eps * (correction1 if self.bias_correction == "both" else ratio)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Gradients that are parts of larger ones, all cut along `dim`, counted from the end.

    `lengths` are those of the wholes along it, one a gradient. `sum_` adds small tensors over all
    parts, in place; whoever holds another part makes the same calls.
    """

    dim: int
    lengths: Sequence[int]
    sum_: Callable[[Sequence[Tensor]], None]


def adamw_(grads: list[Tensor], *, states: States, hyper: Hyper) -> list[Tensor]:
    """Adam's direction; states `exp_avg` and `exp_avg_sq` shaped as the gradients."""
    beta1, beta2 = hyper.betas
    exp_avg, exp_avg_sq = states["exp_avg"], states["exp_avg_sq"]
    torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sq)
    ratio, eps = hyper.denominator()
    if ratio != 1:
        torch._foreach_mul_(denominators, ratio)
    torch._foreach_add_(denominators, eps)
    return list(torch._foreach_div(exp_avg, denominators))


def sgd_(grads: list[Tensor], *, states: States, hyper: Hyper) -> list[Tensor]:
    """Plain gradient descent; no state."""
    return grads


def momentum_(grads: list[Tensor], *, states: States, hyper: Hyper) -> list[Tensor]:
    """Heavy-ball momentum without dampening; state `momentum_buffer` shaped as the gradients."""
    buffers = states["momentum_buffer"]
    torch._foreach_mul_(buffers, hyper.momentum)
    torch._foreach_add_(buffers, grads)
    return buffers


def lion_(grads: list[Tensor], *, states: States, hyper: Hyper) -> list[Tensor]:
    """Sign of an interpolated momentum; state `exp_avg` shaped as the gradients."""
    beta1, beta2 = hyper.betas
    exp_avg = states["exp_avg"]
    updates = list(torch._foreach_lerp(exp_avg, grads, 1 - beta1))
    torch._foreach_sign_(updates)
    torch._foreach_lerp_(exp_avg, grads, 1 - beta2)
    return updates


def adafactor_(
    grads: list[Tensor], *, states: States, hyper: Hyper, split: Split | None = None
) -> list[Tensor]:
    """Factored second moments and clipped updates; all gradients matrices, or all of them vectors.

    States: `exp_avg_sq_row` [..., m] and `exp_avg_sq_col` [..., n] for gradients [..., m, n];
    `exp_avg_sq` for vectors and scalars. Gradients of one shape are stacked and share launches.
    """
    updates: dict[int, Tensor] = {}
    by_shape: dict[tuple[int, torch.Size], list[int]] = {}
    for index, grad in enumerate(grads):
        # Parts are told apart by their wholes: all processes stack the same ones.
        length = 0 if split is None else split.lengths[index]
        by_shape.setdefault((length, grad.shape), []).append(index)
    for (length, _), indices in by_shape.items():
        stacked = _stack([grads[index] for index in indices])
        own = {name: [slot[index] for index in indices] for name, slot in states.items()}
        mean = _Mean(split, length)
        if "exp_avg_sq" in own:
            direction = _of_vectors(stacked, own["exp_avg_sq"], hyper, mean)
        else:
            every = Rows(stacked, ..., ...)
            factors = adafactor_factors_(
                lambda every=every: iter([every]),  # type: ignore[misc]
                shape=stacked.shape,
                states=own,
                hyper=hyper,
                split=split,
                length=length,
            )
            direction = factors.update(every)
            clip = mean.divisor(_norms(direction).square_(), direction.shape)
            direction.div_(clip.view(-1, *[1] * (direction.dim() - 1)))
        updates.update(zip(indices, direction.unbind(0), strict=True))
    return [updates[index] for index in range(len(grads))]


def adafactor_momentum_(
    grads: list[Tensor], *, states: States, hyper: Hyper, split: Split | None = None
) -> list[Tensor]:
    """Running mean of adafactor's updates; its states and `exp_avg` shaped as the gradients."""
    exp_avg = states["exp_avg"]
    factored = {name: slot for name, slot in states.items() if name != "exp_avg"}
    updates = adafactor_(grads, states=factored, hyper=hyper, split=split)
    torch._foreach_lerp_(exp_avg, updates, 1 - hyper.betas[0])
    return exp_avg


@dataclass(frozen=True)
class _Mean:
    """Means over dims of which only a part may live here, `length` being that of the whole."""

    split: Split | None
    length: int

    def of(self, sums: Tensor, dim: int, *, size: int) -> Tensor:
        """Means from sums over dim `dim` (from the end) of gradients that have `size` there."""
        if self.split is None or dim != self.split.dim:
            return sums / size
        self.split.sum_([sums])
        return sums / self.length

    def divisor(self, square: Tensor, shape: Sequence[int]) -> Tensor:
        """What clips updates [k, ...] of a sum of squares [k] each to a root mean square of
        ADAFACTOR_CLIP.
        """
        whole = list(shape)
        if self.split is not None:
            whole[self.split.dim] = self.length
            self.split.sum_([square])
        rms = square.sqrt() / math.sqrt(math.prod(whole[1:]))
        return rms.div_(ADAFACTOR_CLIP).clamp_(min=1.0)


class Rows(NamedTuple):
    """Some rows of gradients: float32 [k, ..., rows, n], and where they are in the states of rows
    [k, ..., m] and of columns [k, ..., n].
    """

    grads: Tensor
    in_rows: Any
    in_columns: Any


class Factors(NamedTuple):
    """Adafactor's update of gradients [k, ..., m, n] before it is clipped is r c^T o G."""

    rows: Tensor
    columns: Tensor

    def update(self, some: Rows) -> Tensor:
        """The update of some rows."""
        update = some.grads * self.rows[some.in_rows].unsqueeze(-1)
        return update.mul_(self.columns[some.in_columns].unsqueeze(-2))


def adafactor_factors_(
    read: Callable[[], Iterator[Rows]],
    *,
    shape: Sequence[int],
    states: States,
    hyper: Hyper,
    split: Split | None = None,
    length: int = 0,
) -> Factors:
    """Adafactor's factors for gradients of one `shape` [k, ..., m, n], whose states advance.

    `read` gives all of them, some rows after others: so of large ones there need not be a float32
    copy at once. `length`: of the whole along the dim where they are `split`.
    """
    rows, columns = states["exp_avg_sq_row"], states["exp_avg_sq_col"]
    mean = _Mean(split, length)
    weight = hyper.step**-ADAFACTOR_DECAY  # 1 - b2_t; 1 at the first step
    row_sums, column_sums = _sums(read, shape, states["exp_avg_sq_row"][0].device, hyper.eps)
    row = _advance(rows, mean.of(row_sums, -1, size=shape[-1]), weight)
    column = _advance(columns, mean.of(column_sums, -2, size=shape[-2]), weight)
    of_rows = mean.of(row.sum(-1), -2, size=shape[-2]).unsqueeze(-1)
    return Factors((row / of_rows).rsqrt_(), column.rsqrt())


def adafactor_divisor(
    squares: Tensor, *, shape: Sequence[int], split: Split | None = None, length: int = 0
) -> Tensor:
    """What clips updates [k, ...] with these sums of `squares` [k], which are overwritten; [k]."""
    return _Mean(split, length).divisor(squares, shape)


def _sums(
    read: Callable[[], Iterator[Rows]], shape: Sequence[int], device: torch.device, eps: float
) -> tuple[Tensor, Tensor]:
    """Sums of G^2 + eps^2 of rows and of columns."""
    sums: tuple[Tensor, Tensor] | None = None
    for some in read():
        squares = some.grads.square().add_(eps**2)
        if some.in_rows is ...:  # all of them: nothing to add to
            return squares.sum(-1), squares.sum(-2)
        sums = sums or _zeros(shape, device)
        sums[0][some.in_rows].add_(squares.sum(-1))
        sums[1][some.in_columns].add_(squares.sum(-2))
        del squares
    return sums or _zeros(shape, device)  # zeros where no row is here


def _zeros(shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    rows = torch.zeros(shape[:-1], device=device)
    return rows, torch.zeros((*shape[:-2], shape[-1]), device=device)


def _norms(stacked: Tensor) -> Tensor:
    """Of each of k tensors [k, ...]."""
    flat = stacked.flatten(1) if stacked.dim() > 1 else stacked.unsqueeze(1)
    norms: Tensor = torch.linalg.vector_norm(flat, dim=1)
    return norms


def _of_vectors(grads: Tensor, running: list[Tensor], hyper: Hyper, mean: _Mean) -> Tensor:
    """Adafactor's update of vectors or scalars [k, ...], which have a second moment each."""
    squares = grads.square().add_(hyper.eps**2)
    update = _advance(running, squares, hyper.step**-ADAFACTOR_DECAY).rsqrt().mul_(grads)
    divisor = mean.divisor(_norms(update).square_(), grads.shape)
    return update.div_(divisor.view(-1, *[1] * (update.dim() - 1)))


def _advance(running: list[Tensor], fresh: Tensor, weight: float) -> Tensor:
    """Move each running mean towards its row of `fresh` [k, ...]; returns them stacked."""
    torch._foreach_lerp_(running, list(fresh.unbind(0)), weight)
    return _stack(running)


def _stack(tensors: list[Tensor]) -> Tensor:
    """Tensors of one shape as [k, ...]; a single one is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """A row of the table: the function, and whether any slice of a tensor may be updated alone."""

    apply_: Callable[..., list[Tensor]]
    elementwise: bool


RULES: dict[str, UpdateRule] = {
    "adamw": UpdateRule(apply_=adamw_, elementwise=True),
    "sgd": UpdateRule(apply_=sgd_, elementwise=True),
    "momentum": UpdateRule(apply_=momentum_, elementwise=True),
    "adafactor": UpdateRule(apply_=adafactor_, elementwise=False),
    "adafactor_momentum": UpdateRule(apply_=adafactor_momentum_, elementwise=False),
    "lion": UpdateRule(apply_=lion_, elementwise=True),
}
"""Every rule; what each keeps is the table of the same keys in `spec/state.py`."""
