"""How an optimiser sees its part of a matrix, without knowing of processes.

A trained tensor may live in parts: rows (dim 0) or columns (dim 1) of it on each of several
processes. Element-wise rules need nothing but their part. Factored statistics, rates relative to a
norm, and low-rank bases need sums over the parts; these are of small tensors, and `sum_` adds them
in place. So the arithmetic of two parts is that of the whole, up to the order of additions.

    whole  W [m, n]   part  W[start : start + k]  (dim 0)   or   W[:, start : start + k]  (dim 1)

A library may cut a tensor anywhere, as one line of numbers: such a part is a vector, `dim` is FLAT,
and only element-wise rules can step it.

    part   W.flatten()[start : start + k]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

FLAT = -1
"""The `dim` of a part that is a range of the tensor laid out in one line."""


def _nothing(tensors: Sequence[Tensor]) -> None:
    """The sum over one part."""


@dataclass(frozen=True, kw_only=True)
class ShardView:
    """The part of a tensor of `shape` that lives here; `dim` None means all of it, FLAT a range of
    its numbers in a line.

    `start`: the first index along `dim` that lives here. `sum_` adds tensors over all parts, in
    place; every process that holds a part must call it with the same shapes in the same order.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    sum_: Callable[[Sequence[Tensor]], None] = _nothing


def whole(tensor: Tensor) -> ShardView:
    """The view of a tensor that is not split."""
    return ShardView(shape=tuple(tensor.shape))
