"""Which part of a tensor a process keeps, and how the part is stored.

A tensor of n rows over p processes is cut as FSDP2 cuts it: ceil(n / p) rows each, the last ones
fewer or none. A packed weight is cut so too, codes and scales alike, and its parts are packed
weights. Matrices that a low-rank method projects from the left are cut by columns, where each
column's share of R = P^T G is its own; from the right, or not at all, by rows (R = G Q).

torch shards only float parameters before 2.12, so integers are then seen as bfloat16, two in one.
That moves the same bytes, and is never computed with: no NaN pattern is looked at, nothing is cast.
A row with an odd number of them cannot be seen so, and its weight stays whole on every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nibble.errors import WeightError
from nibble.nn.quant import PackedWeight
from nibble.place.group import Group
from nibble.spec.lowrank import LowRank

SHARDS_INTEGERS = torch.__version__ >= (2, 12)  # type: ignore[operator]
"""Whether this torch shards parameters that are not floats."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Indices `start` to `start + length` along `dim` of a tensor of `shape`."""

    shape: tuple[int, ...]
    dim: int
    start: int
    length: int

    @property
    def rows(self) -> slice:
        """The indices along `dim`."""
        return slice(self.start, self.start + self.length)

    def of(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor, a view."""
        return whole.narrow(self.dim, self.start, self.length)


def part(shape: Sequence[int], dim: int, *, rank: int, world: int) -> Part:
    """The part that process `rank` of `world` keeps."""
    size = shape[dim]
    each = -(-size // world)
    start = min(rank * each, size)
    return Part(shape=tuple(shape), dim=dim, start=start, length=min(each, size - start))


def split_dim(shape: Sequence[int], low: LowRank | None, *, world: int) -> int:
    """The dim along which a trained tensor is cut: columns where a basis stands on the left alone
    and the processes divide them, else rows.
    """
    if low is None or len(shape) != 2 or not low.projects(tuple(shape)):
        return 0
    return int(low.sides(tuple(shape)) == ("left",) and shape[1] % world == 0)


def storage_view(tensor: Tensor) -> Tensor | None:
    """`tensor`, or its bytes as a type that can be sharded; None where there is no such view."""
    if SHARDS_INTEGERS or tensor.is_floating_point():
        return tensor
    per_element = torch.bfloat16.itemsize // tensor.element_size()
    return None if tensor.shape[-1] % per_element else tensor.view(torch.bfloat16)


def cut(value: Tensor | PackedWeight, own: Part, *, name: str) -> Tensor | PackedWeight:
    """The own rows of a checkpoint's value, which comes whole or as the own rows already.

    `own` is of the dense weight. Raises WeightError for any other shape.
    """
    if isinstance(value, PackedWeight):
        there = value.tensors["codes"].shape[0]
        if there == own.length:
            return value
        if there == own.shape[0] and own.dim == 0:
            return PackedWeight(
                spec=value.spec, tensors={n: t[own.rows] for n, t in value.tensors.items()}
            )
    else:
        if tuple(value.shape) == own.shape:
            return own.of(value)
        if own.dim == 0 and tuple(value.shape) == (own.length, *own.shape[1:]):
            return value
    found = list(value.shape) if isinstance(value, Tensor) else f"{there} packed rows"
    raise WeightError(
        f"{name} has shape {found} in the checkpoint and {list(own.shape)} in the model: "
        "config.json is of another model"
    )


def collected(group: Group, own: Tensor, dim: int, sizes: Sequence[int]) -> Tensor | None:
    """All of a tensor, cut along `dim` into parts `sizes` long on the first ranks, in host memory
    of rank 0; None on the others. Those that hold a part must all call it.
    """
    mine = own.detach().cpu().contiguous()
    with group.during("a tensor of the checkpoint"):
        if group.rank > 0:
            if mine.numel():
                dist.send(_bytes(mine), dst=0)
            return None
        shape = list(mine.shape)
        shape[dim] = sum(sizes)
        found = torch.empty(shape, dtype=mine.dtype)
        start = 0
        for rank, size in enumerate(sizes):
            target = found.narrow(dim, start, size)
            start += size
            if rank == 0:
                target.copy_(mine)
            elif target.numel():
                held = target if target.is_contiguous() else torch.empty_like(target).contiguous()
                dist.recv(_bytes(held), src=rank)
                if held is not target:
                    target.copy_(held)
    return found


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, whatever its type."""
    return tensor.reshape(-1).view(torch.uint8)
