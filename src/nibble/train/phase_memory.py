"""What each phase of a run has had of memory at its peak: load, first and later steps, evaluation,
save.

A phase ends by reading the peaks and beginning new ones. Twice cached memory is given back as well:
when weights are loaded, and behind the first step, which needs some of it only once. What is left
of gaps would be reserved for the rest of the run; for the same reason the loop makes the
optimiser's state before the first step and not between its gradients. That takes some milliseconds
once; other phases cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from nibble.place.base import Memory, Placement

LOAD, FIRST, STEADY, EVALUATION, SAVE = PHASES = (
    "load",
    "first step",
    "steady step",
    "evaluation",
    "save",
)
"""As the plan names them (spec/phases.py)."""


class PhaseMemory:
    """Peaks of one process by phase, from now on; the first phase is `load`."""

    def __init__(self, place: Placement) -> None:
        self._place = place
        self._now = LOAD
        self._peaks: dict[str, Memory] = {}
        place.reset_memory()

    def loaded(self) -> None:
        """Weights are in their place; steps follow."""
        self._end(keep_cache=False)
        self._now = FIRST

    def stepped(self) -> None:
        """A step was made."""
        if self._now == FIRST:
            self._end(keep_cache=False)
            self._now = STEADY

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What happens inside belongs to `phase`."""
        before = self._now
        self._end()
        self._now = phase
        try:
            yield
        finally:
            self._end()
            self._now = before

    def _end(self, *, keep_cache: bool = True) -> None:
        self._peaks[self._now] = largest(self._place.memory(), self._peaks.get(self._now))
        self._place.reset_memory(keep_cache=keep_cache)

    def peaks(self) -> dict[str, Memory]:
        """Of each phase that was, the most that any process has had; all must ask together."""
        self._end()
        if self._place.world > 1:
            return _of_all(self._peaks, self._place)
        return {name: self._peaks[name] for name in PHASES if name in self._peaks}


def largest(one: Memory, other: Memory | None) -> Memory:
    """The larger of each number."""
    if other is None:
        return one
    return Memory(
        allocated_bytes=max(one.allocated_bytes, other.allocated_bytes),
        reserved_bytes=max(one.reserved_bytes, other.reserved_bytes),
        host_bytes=max(one.host_bytes, other.host_bytes),
    )


def overall(peaks: Mapping[str, Memory]) -> Memory:
    """The peak of the whole run."""
    found: Memory | None = None
    for memory in peaks.values():
        found = largest(memory, found)
    assert found is not None, "a run has a phase"
    return found


def _of_all(peaks: Mapping[str, Memory], place: Placement) -> dict[str, Memory]:
    """The largest number of any process, by phase."""
    table = torch.zeros(place.world, len(PHASES), 3, dtype=torch.int64)
    for row, name in enumerate(PHASES):
        if name in peaks:
            seen = peaks[name]
            numbers = [seen.allocated_bytes, seen.reserved_bytes, seen.host_bytes]
            table[place.rank, row] = torch.tensor(numbers)
    rows = place.sum(table).amax(0).tolist()
    return {
        name: Memory(allocated_bytes=a, reserved_bytes=r, host_bytes=h)
        for name, (a, r, h) in zip(PHASES, rows, strict=True)
        if h
    }
