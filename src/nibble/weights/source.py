"""What every kind of checkpoint looks like from inside: names with shapes, and one tensor at a
time.

A source knows its tensors without reading them. `read` returns a tensor in host memory that belongs
to the caller, or a packed weight where the checkpoint is already quantised. A source whose names
are not those of transformers' checkpoints (GGUF) is bound to a model first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from nibble.nn.quant import PackedWeight
from nibble.spec.formats import FormatSpec


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a checkpoint. For a packed weight, `shape` is the dense weight's and `packed`
    is true."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    packed: bool = False


def cut(value: Tensor | PackedWeight, rows: slice | None) -> Tensor | PackedWeight:
    """Rows of what was read whole, in memory of their own."""
    if rows is None:
        return value
    if isinstance(value, Tensor):
        return value[rows].clone()
    tensors = {name: tensor[rows].clone() for name, tensor in value.tensors.items()}
    return PackedWeight(spec=value.spec, tensors=tensors)


class Source(Protocol):
    """A checkpoint that is open for reading.

    `packed_spec` is the format in which it is quantised already, or None. `native` says that its
    names are the model's own, so that no renaming of transformers' applies.
    """

    native: bool
    packed_spec: FormatSpec | None

    def entries(self) -> Mapping[str, Entry]:
        """All tensors by name."""
        ...

    def read(self, name: str, rows: slice | None = None) -> Tensor | PackedWeight:
        """Read one tensor, or only these rows of it, into host memory; WeightError when the file
        ends early. Where rows do not lie together all are read and the others dropped.
        """
        ...

    def bind(self, model: nn.Module) -> Source:
        """This source under names that `model` (a skeleton on meta) understands."""
        ...

    def describe(self) -> str:
        """Where it lies, for messages."""
        ...
