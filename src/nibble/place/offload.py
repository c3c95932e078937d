"""Tensors that wait in host memory from forward to backward, carried behind the computation.

Idea. What a checkpointed block keeps is not needed until its backward, so it may leave the device:
a side stream copies it to pinned host memory while the block computes, and brings it back while the
block above it goes backward. The order of backward is that of forward reversed, so one block ahead
is always right:

    forward    compute   | block i-1 | block i   | block i+1 |
               out       |   x_i-1   |    x_i    |  x_i+1    |
    backward   compute   | block i+1 | block i   | block i-1 |
               in        |    x_i    |   x_i-1   |           |

What it takes on the device: one block's tensors on their way out and one's on their way in; above
512 MiB a block the latter would cost more than it gains, and a block's tensors come when they are
asked for. The last block's stay: its backward comes at once. Events order the streams and the host
waits for none, so it may run ahead. All copies go through one side stream, which alone orders the
reuse of host buffers. A tensor on its way out is held until the next block begins, when the
computation waits for the copy; a buffer on its way in is made on the computation's stream, which
waits for the copy before it reads.

Host memory is a pool of buffers that live as long as the run: registered with the driver, exactly
as large as the largest tensor that needed one (torch's pinned allocator would round 33 MiB up to
64), taken by the smallest that fits. Rows of unequal lengths make a buffer grow a few times at the
start of a run, each time at the cost of registering it (some 0.2 s a GiB, and a wait). On a CPU the
same decisions are made and copies are done at once; nothing is gained there.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nibble.errors import PlacementError
from nibble.spec.checkpointing import PREFETCH_MAX_BYTES
from nibble.spec.units import show_bytes

PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every context of the process."""
MIN_BYTES = 1 << 16
"""Smaller tensors stay: a copy would cost more than they do."""
Unregister = Callable[[int], object]


class Buffer:
    """Host memory of `num_bytes`; pinned where the device has a bus."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.num_bytes = num_bytes
        self.bytes = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
        if device.type == "cuda":
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            address = self.bytes.data_ptr()
            code = int(runtime.cudaHostRegister(address, num_bytes, PORTABLE))
            if code != 0:
                raise PlacementError(
                    f"the driver refused to pin {show_bytes(num_bytes)} for activations (CUDA "
                    f"error {code}): raise the limit on locked memory (ulimit -l), or set "
                    "train.activation_offload=false"
                )
            weakref.finalize(self, _unregister, runtime.cudaHostUnregister, self.bytes)

    def like(self, tensor: Tensor) -> Tensor:
        """The buffer's beginning, in the type and order of `tensor`."""
        flat = self.bytes[: tensor.numel() * tensor.element_size()].view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride())


def _unregister(release: Unregister, memory: Tensor) -> None:
    """Give the pages back; `memory` keeps them mapped until then."""
    release(memory.data_ptr())


class HostPool:
    """The buffers of one device, and its side stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free: list[Buffer] = []
        self.num_bytes = 0
        """Of all buffers."""
        self._leaving: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._last: weakref.ref[Parked] | None = None

    def take(self, num_bytes: int) -> Buffer:
        """A buffer of at least `num_bytes`: the smallest free one, or a new one in the place of the
        largest that is too small.
        """
        fitting = [b for b in self._free if b.num_bytes >= num_bytes]
        if fitting:
            found = min(fitting, key=lambda b: b.num_bytes)
            self._free.remove(found)
            return found
        if self._free:
            small = max(self._free, key=lambda b: b.num_bytes)
            self._free.remove(small)
            self.num_bytes -= small.num_bytes
            if self.stream is not None:
                self.stream.synchronize()  # copies of it may be under way; once a growth
            del small
        self.num_bytes += num_bytes
        return Buffer(num_bytes, self.device)

    def give_back(self, buffer: Buffer) -> None:
        """Let others have it; the side stream puts their copies behind those under way."""
        self._free.append(buffer)

    def begin(self, *, is_first: bool = False) -> Parked:
        """What the next block keeps goes into the result; the block before must have left by now.

        `is_first`: a pass begins, and the blocks of another one are none of its business.
        """
        self.let_go()
        before = None if is_first else self._last
        parked = Parked(self, before)
        self._last = weakref.ref(parked)
        return parked

    def let_go(self) -> None:
        """The computation waits for what is on its way out, whose memory may then be taken."""
        for _, event in self._leaving:
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)
        self._leaving.clear()

    def send(self, tensor: Tensor, buffer: Buffer) -> None:
        """Begin to copy to the host; `tensor` is held until the next block."""
        target = buffer.like(tensor)
        if self.stream is None:
            target.copy_(tensor)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(tensor, non_blocking=True)
            event = self.stream.record_event()
        self._leaving.append((tensor, event))

    def fetch(self, buffer: Buffer, like: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Begin to copy to the device; whoever reads must wait for the event."""
        arrived = torch.empty_strided(
            like.shape, like.stride(), dtype=like.dtype, device=self.device
        )
        if self.stream is None:
            arrived.copy_(buffer.like(like))
            return arrived, None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            arrived.copy_(buffer.like(like), non_blocking=True)
            return arrived, self.stream.record_event()


class Parked:
    """What one block keeps during one pass, in the order in which it came."""

    def __init__(self, pool: HostPool, before: weakref.ref[Parked] | None) -> None:
        self._pool, self._before = pool, before
        self._buffers: list[Buffer] = []
        self._likes: list[Tensor] = []
        self._arriving: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}
        self._is_asked = False

    @property
    def num_bytes(self) -> int:
        """Of all that is here."""
        return sum(like.numel() * like.element_size() for like in self._likes)

    def put(self, tensor: Tensor) -> int:
        """Send a dense tensor away and return its number here."""
        tensor = tensor.detach()
        buffer = self._pool.take(tensor.numel() * tensor.element_size())
        self._pool.send(tensor, buffer)
        self._buffers.append(buffer)
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self._likes.append(meta)
        return len(self._buffers) - 1

    def prefetch(self) -> None:
        """Begin to bring all of it back, once."""
        if self._is_asked:
            return
        self._is_asked = True
        for number in range(len(self._buffers)):
            self._arriving[number] = self._pool.fetch(self._buffers[number], self._likes[number])

    def turn(self) -> None:
        """The block's backward begins: its own tensors come if they have not yet, those of the
        block below next.
        """
        self._pool.let_go()
        self.prefetch()
        below = None if self._before is None else self._before()
        if below is not None and below.num_bytes <= PREFETCH_MAX_BYTES:
            below.prefetch()

    def get(self, number: int) -> Tensor:
        """Tensor `number` on the device, for the computation's stream; a fresh copy each time."""
        found = self._arriving.pop(number, None)
        arrived, event = found or self._pool.fetch(self._buffers[number], self._likes[number])
        if event is not None:
            torch.cuda.current_stream(self._pool.device).wait_event(event)
        return arrived

    def __del__(self) -> None:
        for _, event in self._arriving.values():  # never read: their memory may not be taken yet
            if event is not None:
                torch.cuda.current_stream(self._pool.device).wait_event(event)
        for buffer in self._buffers:
            self._pool.give_back(buffer)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill its memory without gaps, in whatever order of dims."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
