"""What the floors above may ask of the devices that a run owns.

A placement decides where tensors live and what one process adds to the others; the loop, the
loaders and the checkpoints are written once against this contract and never ask which placement it
is. Ranks, devices and streams are known here and nowhere else. One process on one device
(`single.py`) makes most of it trivial, which is the point: the same twenty steps give the same loss
on every placement.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from nibble.data import Batch
from nibble.errors import PlacementError
from nibble.models import Built
from nibble.nn.quant import PackedWeight
from nibble.optim.shards import ShardView
from nibble.place.activations import Activations
from nibble.place.group import Group
from nibble.spec.config import Optim

Objective = Callable[[nn.Module, Batch], Tensor]
"""From the model and a batch to the sum of its losses (use/objective.py)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peaks since the last reset. `reserved_bytes` is what the device had to have; without a GPU
    both are 0.
    """

    allocated_bytes: int
    reserved_bytes: int
    host_bytes: int


class Placement(Protocol):
    """Where a run's tensors live."""

    group: Group
    """The processes of the run."""

    @property
    def num_parts(self) -> int:
        """How many processes, the first ones and so on, share one copy of what is trained."""
        ...

    def expect(self, optim: Optim) -> None:
        """Learn, before `arrange`, what will step the trained parameters."""
        ...

    @property
    def device(self) -> torch.device:
        """The device that this process computes on."""
        ...

    @property
    def rank(self) -> int:
        """This process among `world`."""
        ...

    @property
    def world(self) -> int:
        """How many processes share the run."""
        ...

    def arrange(self, built: Built, *, activations: Activations) -> nn.Module:
        """Give the meta model storage where it will live; its weights are still to be loaded."""
        ...

    def rows(self, model: nn.Module, name: str) -> slice | None:
        """The rows of the checkpoint's tensor `name` that this process keeps; None for all. What
        is not kept need not be read.
        """
        ...

    def packed(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """The packed tensors of the checkpoint's weight `name`, of the rows that live here."""
        ...

    def load(self, model: nn.Module, name: str, value: Tensor | PackedWeight) -> None:
        """Fill what the checkpoint calls `name`, quantising on arrival."""
        ...

    def parts(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model in parts, each with its weights on the device while one is at it; all
        processes together, when every tensor has been loaded.
        """
        ...

    def put_(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Copy into a parameter of the model what lives here of a whole value."""
        ...

    def whole(self, own: Tensor, dim: int | None, sizes: Sequence[int]) -> Tensor | None:
        """All of a tensor of which `own` lives here, cut along `dim` (None: not cut) into parts
        that are `sizes` long; in host memory on rank 0, None elsewhere. All processes must ask.
        """
        ...

    def check_loaded(self, model: nn.Module, *, initialised: Iterable[Tensor]) -> None:
        """Raise WeightError if a parameter was neither loaded nor `initialised` on purpose."""
        ...

    def trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What the optimiser of this process steps, by the model's names: the parameters, or the
        parts of them that live here. Their `.grad` is complete after a step's last micro-batch.
        """
        ...

    def view(self, name: str) -> ShardView:
        """Which part of the trained parameter `name` lives here, and how to add over the others."""
        ...

    def around(self, objective: Objective) -> Objective:
        """The objective as it is computed here: a library may want to see each pass."""
        ...

    def batch(self, batch: Batch) -> Batch:
        """The batch on this process's device."""
        ...

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one pass; gradients are complete after the last one of
        a step.
        """
        ...

    def clip_(self, parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale the gradients to a global norm of at most `max_norm`; returns the norm before."""
        ...

    def follow(self) -> None:
        """Let what copies the trained parameters follow them. All processes must call it after each
        step, made or skipped, and when the parameters were loaded.
        """
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        ...

    def during(self, what: str) -> AbstractContextManager[None]:
        """Names what this process is at, for the error when another one goes."""
        ...

    def barrier(self, name: str = "the others") -> None:
        """Wait for all processes; `name` says in an error what they did not come to."""
        ...

    def memory(self) -> Memory:
        """Peak memory of this process."""
        ...

    def reset_memory(self, *, keep_cache: bool = False) -> None:
        """Start a new peak, with cached memory given back unless it is kept."""
        ...

    def close(self) -> None:
        """Give back what outlives a process: shared memory, process groups."""
        ...


def peak_memory(place: Placement) -> Memory:
    """The most that any process of the run has had of each kind; all must ask together."""
    mine = place.memory()
    if place.world == 1:
        return mine
    table = torch.zeros(place.world, 3, dtype=torch.int64)
    table[place.rank] = torch.tensor(
        [mine.allocated_bytes, mine.reserved_bytes, mine.host_bytes], dtype=torch.int64
    )
    allocated, reserved, host = place.sum(table).amax(0).tolist()
    return Memory(allocated_bytes=allocated, reserved_bytes=reserved, host_bytes=host)


@contextmanager
def out_of_memory_is_explained(advice: str) -> Iterator[None]:
    """Turn an allocator's failure into one line with the plan's advice; done here alone."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PlacementError(f"out of GPU memory: {_allocation(str(error))}; {advice}") from None
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if (
            isinstance(error, MemoryError)
            or "not enough memory" in text
            or "can't allocate" in text
        ):
            raise PlacementError(f"out of host memory: {_allocation(text)}; {advice}") from None
        raise


def _allocation(text: str) -> str:
    """What an allocator's message says about sizes, without its settings and hints."""
    asked = re.search(r"allocate ([\d.]+ [KMGT]?i?B|\d+ bytes)", text)
    there = re.search(r"total capacity of ([\d.]+ [KMGT]iB)", text)
    allowed = re.search(r"([\d.]+ [KMGT]iB) allowed", text)
    said = f"{asked[1]} more were asked for" if asked else "an allocation failed"
    if allowed or there:
        said += (
            f", {allowed[1]} are allowed"
            if allowed
            else f", the card has {there[1]}"
            if there
            else ""
        )
    return said


def host_peak_bytes() -> int:
    """The most memory this process has had resident. Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
