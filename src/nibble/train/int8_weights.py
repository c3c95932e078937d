"""INT8 weights from recipe to disk: what an optimiser updates, a checkpoint holds, a reader gets.

While `optim.weights=int8` trains, a projected matrix is codes and scales (nn/int8_weights.py), and
the parameter of its name is a stand-in without values. So the optimiser is told where values are,
checkpoints hold `NAME.codes` and `NAME.scales` as they are, and whoever reads a checkpoint to use
the model gets `NAME.weight` = codes * scales, one matrix at a time: evaluation, chat and export
meet an ordinary model. Costs a decoding for each tensor that is read. It knows no training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from nibble.nn.int8_weights import Int8Linear
from nibble.numerics import int8_weights
from nibble.optim import Int8Store, Optimizer, keep_int8_
from nibble.train.whole import WholeFile

CODES, SCALES = ".codes", ".scales"


def keep_(optimizer: Optimizer, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Let the optimiser step the codes of a model's INT8 linears.

    Returns what stands for each stand-in in a checkpoint: its name to tensors by their names.
    Raises ConfigError for a linear that the optimiser does not project.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    stores: dict[Tensor, Int8Store] = {
        m.weight: Int8Store(codes=m.codes, scales=m.scales) for m in linears.values()
    }
    keep_int8_(optimizer, stores)
    return {
        f"{name}.weight": {f"{name}{CODES}": linear.codes, f"{name}{SCALES}": linear.scales}
        for name, linear in linears.items()
    }


def _coded(names: Collection[str]) -> dict[str, str]:
    """Names of weights that are there as codes and scales, to the names of their modules."""
    stems = (name.removesuffix(CODES) for name in names if name.endswith(CODES))
    return {f"{stem}.weight": stem for stem in stems if f"{stem}{SCALES}" in names}


def _dense_names(names: Collection[str], coded: Mapping[str, str]) -> frozenset[str]:
    parts = {f"{stem}{part}" for stem in coded.values() for part in (CODES, SCALES)}
    return (frozenset(names) - parts) | frozenset(coded)


class DenseTensors(Mapping[str, Tensor]):
    """A checkpoint's tensors with INT8 weights as float32 ones, made when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._stems = _coded(frozenset(tensors))
        self._names = _dense_names(frozenset(tensors), self._stems)

    def __getitem__(self, name: str) -> Tensor:
        stem = self._stems.get(name)
        if stem is None:
            return self._tensors[name]
        codes, scales = (self._tensors[f"{stem}{part}"] for part in (CODES, SCALES))
        return int8_weights.decode(codes, scales, dtype=torch.float32)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


class DenseFile(WholeFile):
    """The same of a checkpoint's file, from which rows are read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._stems = _coded(self.names)
        self.names = _dense_names(self.names, self._stems)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        stem = self._stems.get(name)
        return super().shape(name if stem is None else f"{stem}{CODES}")

    def read(self, name: str, dim: int | None = None, rows: slice | None = None) -> Tensor:
        """A tensor, or the indices `rows` of it along `dim`."""
        stem = self._stems.get(name)
        if stem is None:
            return super().read(name, dim, rows)
        codes, scales = (super(DenseFile, self).read(f"{stem}{part}") for part in (CODES, SCALES))
        whole = int8_weights.decode(codes, scales, dtype=torch.float32)
        return whole if dim is None or rows is None else whole[(*(slice(None),) * dim, rows)]
