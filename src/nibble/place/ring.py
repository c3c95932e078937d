"""A few buffers on the device through which blocks pass, each copied while others compute.

The order of use is known: up through the blocks in forward, down again in backward, and up in the
next pass. So while block i computes, the ring of R buffers copies the next R - 1 of its direction:

    forward   i, i+1, .. i+R-1        backward   i, i-1, .. i-R+1

At the turn nothing is thrown away: the last R blocks of forward are the first of backward, and the
last of backward are the first of the next forward, copied under the optimiser's update. A buffer
saves two copies a step, just as a resident block does.

Events go both ways. A copy waits until the computation has left its buffer, the computation until
the copy has come; the host waits for neither, so it may run any number of blocks ahead. Overwriting
a buffer that a kernel still reads is the mistake that makes gradients wrong without a sign; here
`give_back` records the event behind the last kernel that used it, and only that lets a copy begin.
What backward reads it reads by taking the block again, never through a tensor that was kept.

On a CPU the same decisions are made and the copies are done at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Way = Literal["up", "down", "once"]
"""Forward before a backward, backward, or forward alone, after which the first block comes."""
Copy = Callable[[Tensor, Tensor], None]
POISON = 255
"""Bytes of a buffer that may not be read: NaN in every float type."""


def copy_(target: Tensor, source: Tensor) -> None:
    """Copy on the present stream without waiting; at the bus's rate where `source` is pinned."""
    target.copy_(source, non_blocking=True)


@dataclass(eq=False, kw_only=True)
class Slot:
    """One buffer: what it holds or is about to, and the events behind its copy and its use."""

    number: int
    buffer: Tensor
    block: int | None = None
    arrived: torch.cuda.Event | None = None
    free: torch.cuda.Event | None = None


class Ring:
    """`num_slots` buffers for the blocks whose bytes `sources` holds in host memory, by number.

    At most one block is taken at a time. `poison`: for tests; what is given back becomes NaN and is
    copied anew each time, so that any use after that shows.
    """

    def __init__(
        self,
        sources: Sequence[Tensor],
        *,
        num_slots: int,
        device: torch.device,
        copy: Copy = copy_,
        poison: bool = False,
    ) -> None:
        self._sources = sources
        self._device = device
        self._copy = copy
        self._poison = poison
        self._taken: Slot | None = None
        self.num_copies = 0
        """Since the beginning."""
        self._stream = (
            torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        )
        self._order: list[int] = []
        self._position: dict[int, int] = {}
        largest = max((source.numel() for source in sources), default=0)
        self.slots = [
            Slot(number=number, buffer=torch.empty(largest, dtype=torch.uint8, device=device))
            for number in range(num_slots)
        ]
        for slot in self.slots:
            self._leave(slot)
        self.set_order(range(len(sources)))

    def set_order(self, blocks: Sequence[int]) -> None:
        """Which blocks pass through, in the order of forward; none may be taken."""
        assert self._taken is None
        self._order = list(blocks)
        self._position = {block: position for position, block in enumerate(self._order)}
        for slot in self.slots:
            if slot.block not in self._position:
                slot.block = None

    @property
    def taken(self) -> int | None:
        """The block that is in use."""
        return None if self._taken is None else self._taken.block

    def prepare(self) -> None:
        """Begin to copy the blocks that come first."""
        self._fetch(self._order[: len(self.slots)])

    def take(self, block: int, way: Way) -> Slot:
        """The buffer with `block`, which may be read by what the present stream does from now on
        until `give_back`; the next ones of its way begin to come.

        A block that is still taken is given back first: an aborted pass leaves nothing behind.
        """
        if self._taken is not None:
            if self._taken.block == block:
                return self._taken
            self.give_back()
        self._fetch([block, *self._ahead(block, way)])
        slot = next(slot for slot in self.slots if slot.block == block)
        self._taken = slot
        if slot.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.arrived)
        return slot

    def give_back(self) -> None:
        """What was taken is not read by anything that is launched after this."""
        slot, self._taken = self._taken, None
        if slot is None:
            return
        if self._poison:
            slot.buffer.fill_(POISON)
            slot.block = None
        self._leave(slot)

    def wait(self) -> None:
        """Wait on the host until no copy is under way."""
        if self._stream is not None:
            self._stream.synchronize()

    def _leave(self, slot: Slot) -> None:
        """Let copies into a slot begin behind what the present stream has been given."""
        if self._device.type == "cuda":
            slot.free = slot.free or torch.cuda.Event()  # type: ignore[no-untyped-call]
            slot.free.record(torch.cuda.current_stream(self._device))

    def _ahead(self, block: int, way: Way) -> list[int]:
        """The blocks after this one, as many as there are other buffers."""
        position, room = self._position[block], len(self.slots) - 1
        if way == "down":
            return self._order[max(0, position - room) : position][::-1]
        after = self._order[position + 1 : position + 1 + room]
        if way == "once":
            after += self._order[: min(room - len(after), position)]
        return after

    def _fetch(self, wanted: Sequence[int]) -> None:
        """Begin the copies of what is wanted and not here, soonest first, over what is not."""
        here = {slot.block for slot in self.slots}
        at = self._position[wanted[0]] if wanted else 0
        over = [s for s in self.slots if s is not self._taken and s.block not in wanted]
        # Empty ones first, then what is furthest from what is needed now.
        over.sort(
            key=lambda s: (s.block is not None, -abs(self._position.get(s.block or 0, 0) - at))
        )
        for block in wanted:
            if block not in here:
                self._start(over.pop(0), block)

    def _start(self, slot: Slot, block: int) -> None:
        source = self._sources[block]
        target = slot.buffer[: source.numel()]
        slot.block = block
        self.num_copies += 1
        if self._stream is None:
            self._copy(target, source)
            return
        assert slot.free is not None
        self._stream.wait_event(slot.free)
        with torch.cuda.stream(self._stream):
            self._copy(target, source)
            slot.arrived = slot.arrived or torch.cuda.Event()  # type: ignore[no-untyped-call]
            slot.arrived.record(self._stream)
