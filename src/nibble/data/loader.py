"""Which rows make which step, on which process, in which epoch.

A unit is a row, or a packed row. With n units, micro-batches of b, k of them in a step and w
processes, a step takes the next G = b k w units of the epoch's order; micro-batch m of process r
is the slice (m w + r) b .. + b of them. So the units of a step depend on G alone, not on how G is
made, and a run continues on another number of processes with the same G.

The order of an epoch is a pure function of (seed, epoch), and which documents share a packed row
is a function of the seed alone, so every epoch has the same number of steps. The last step of an
epoch has the n mod G units that are left, spread evenly over as few micro-batches as hold them,
the same number on every process (collectives must match); a process that gets no unit gets padding
with num_targets 0. Nothing is dropped or repeated: every row is seen once an epoch, and a
token-weighted loss makes the short step right.

The state is two integers and the sizes they count in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nibble.data.order import permutation
from nibble.data.pack import Batch, filler_batch, packed_batch, padded_batch, plan_bins
from nibble.data.rows import Rows
from nibble.errors import CheckpointError, ConfigError, DataError


class Loader:
    """Steps without end: each is the list of this process's micro-batches.

    `accumulation` of them, fewer in the last step of an epoch. `max_length` is needed for packing;
    `multiple` rounds the length of padded rows up.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        micro_batch_size: int,
        accumulation: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        packing: bool = False,
        max_length: int | None = None,
        pad_id: int = 0,
        shuffle: bool = True,
        multiple: int = 1,
    ) -> None:
        assert 0 <= rank < world and micro_batch_size > 0 and accumulation > 0
        if not len(rows):
            raise DataError("there are no rows to make batches of")
        if packing and max_length is None:
            raise ConfigError("packing needs max_length")
        self.rows = rows
        self.seed = seed
        self.epoch = 0
        """The epoch of the next step, from 0."""
        self.step = 0
        """The next step within the epoch, from 0."""
        self._shuffle = shuffle
        self._micro_batch_size, self._rank, self._world = micro_batch_size, rank, world
        self._pad_id, self._multiple = pad_id, multiple
        self._bins = None
        if packing and max_length is not None:
            self._bins = plan_bins(rows.lengths, capacity=max_length, seed=seed, shuffle=shuffle)
        self.num_units = len(rows) if self._bins is None else len(self._bins)
        """Rows, or packed rows, of an epoch."""
        self.units_per_step = micro_batch_size * accumulation * world
        self._order: tuple[int, NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps that show every row once; the last may be smaller."""
        return -(-self.num_units // self.units_per_step)

    def total_steps(self, epochs: float) -> int:
        """Steps in so many epochs, at least 1."""
        # Less a hair, so that 0.3 of 10 steps is 3 and not the 4 of 3.0000000000000004.
        return max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))

    def steps_of_tokens(self, num_tokens: int) -> int:
        """Steps that train on at least so many tokens, as many as rows hold in the mean."""
        return max(1, math.ceil(num_tokens * self.steps_per_epoch / self.rows.num_tokens))

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The units of an epoch in the order in which they are seen by all processes together."""
        if self._order is None or self._order[0] != epoch:
            units = np.arange(self.num_units, dtype=np.int64)
            order = permutation(self.num_units, self.seed, epoch, 1) if self._shuffle else units
            self._order = (epoch, order)
        return self._order[1]

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """This process's micro-batches of the next step; the state then names the one after."""
        units = self._step_units(self.epoch, self.step)
        self.step += 1
        if self.step == self.steps_per_epoch:
            self.epoch, self.step = self.epoch + 1, 0
        return [self._batch(part) for part in units]

    def row_numbers(self, epoch: int, step: int) -> list[list[int]]:
        """The rows of this process's micro-batches in a step, without making them."""
        parts = self._step_units(epoch, step)
        if self._bins is None:
            return [part.tolist() for part in parts]
        bins = self._bins
        return [[int(row) for unit in part for row in bins[int(unit)]] for part in parts]

    def _step_units(self, epoch: int, step: int) -> list[NDArray[np.int64]]:
        begin = step * self.units_per_step
        units = self.order(epoch)[begin : begin + self.units_per_step]
        passes = -(-len(units) // (self._micro_batch_size * self._world))
        parts = np.array_split(units, passes * self._world)
        return parts[self._rank :: self._world]

    def _batch(self, units: NDArray[np.int64]) -> Batch:
        if not len(units):
            return filler_batch(self.rows, pad_id=self._pad_id, packing=self._bins is not None)
        if self._bins is not None:
            bins = [self._bins[int(unit)] for unit in units]
            return packed_batch(self.rows, bins, pad_id=self._pad_id)
        return padded_batch(self.rows, units, pad_id=self._pad_id, multiple=self._multiple)

    def state_dict(self) -> dict[str, int]:
        """Where the next step is, and the sizes that this position counts in."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seed": self.seed,
            "num_rows": len(self.rows),
            "num_units": self.num_units,
            "units_per_step": self.units_per_step,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on exactly where `state` was taken; CheckpointError if data or sizes differ."""
        mine = self.state_dict()
        for name in ("seed", "num_rows", "num_units", "units_per_step"):
            if state.get(name) != mine[name]:
                raise CheckpointError(
                    f"the checkpoint was made with {name} {state.get(name)} and this run has "
                    f"{mine[name]}: go on with the data, seed and batch size it was made with"
                )
        self.epoch, self.step = int(state["epoch"]), int(state["step"])


def one_pass(
    rows: Rows,
    *,
    micro_batch_size: int,
    rank: int = 0,
    world: int = 1,
    packing: bool = False,
    max_length: int | None = None,
    pad_id: int = 0,
) -> Iterator[Batch]:
    """Every row once in the order of the files, for evaluation; equally many batches on each
    process."""
    loader = Loader(
        rows,
        micro_batch_size=micro_batch_size,
        accumulation=1,
        seed=0,
        rank=rank,
        world=world,
        packing=packing,
        max_length=max_length,
        pad_id=pad_id,
        shuffle=False,
    )
    for _ in range(loader.steps_per_epoch):
        yield from next(loader)
