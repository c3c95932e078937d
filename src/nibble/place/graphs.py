"""Work recorded as a CUDA graph and replayed by one call of the host.

A micro-batch of an 8B model is some three thousand launches, each of which costs the host 30 to 70
us of Python and autograd; a replay costs one launch. What is recorded are kernels and addresses:
they must be the same each time, and nothing may wait for the device in between.

Memory. Everything that recorded work allocates comes from a pool of its own, which is as large as
the work's peak and stays. All recordings share it, since they never run at the same time. What was
cached for eager passes is given back first, so the sum stays about what it was; SPARE_BYTES are
left for what runs between passes, or there is no recording.

Before the first recording the work is observed while it runs eagerly: whether the host waits for
the device somewhere (torch's own debug mode tells). Work that waits is refused by name instead of
failing in the recording. Later shapes of the same work are recorded unseen: kernels that they are
the first to need are loaded meanwhile, which CAPTURE_MODE allows; a wait fails as ever. Random
numbers are drawn as torch's default generator would have drawn them eagerly.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from nibble.nn.tiles import Tiled
from nibble.place.activations import Recomputed
from nibble.place.base import Placement
from nibble.place.single import Single
from nibble.spec.graphs import SPARE_BYTES

T = TypeVar("T")
NO_MEMORY = "the device has no memory left for it"
WAITS, PROTOTYPE = "called a synchronizing CUDA operation", "debug mode is a prototype"
"""What torch's debug mode says, of an operation and of itself."""


CAPTURE_MODE = "relaxed"
"""Calls that are no part of the stream's work may be made while it is recorded, by this thread
(loading a kernel) and others (sinks, pinning)."""


class NotRecordedError(Exception):
    """Work could not be recorded; nothing of it was done. The text says why."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """One eager run: where the host waited for the device (None: nowhere)."""

    waits: str | None


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """`replay` does the work again; `num_bytes` more device memory is kept for it."""

    replay: Callable[[], None]
    num_bytes: int


class Recorder(Protocol):
    """Whoever observes and records work."""

    def observe(self, work: Callable[[], T]) -> tuple[T, Observed]:
        """Do the work eagerly, and watch."""
        ...

    def record(self, work: Callable[[], None]) -> Recorded:
        """Record the work without doing it. Raises NotRecordedError."""
        ...

    def has_room(self, num_bytes: int) -> bool:
        """Whether eager work may have so much memory beside the recordings."""
        ...

    def release(self) -> None:
        """Give the memory of recordings back, for good: nobody holds one any more."""
        ...


class CudaRecorder:
    """Records CUDA graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._num_recorded = self._pool_bytes = 0
        self._broken = ""

    def observe(self, work: Callable[[], T]) -> tuple[T, Observed]:
        """See `Recorder`."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = work()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = None
        for warning in told:
            if WAITS in str(warning.message):
                waits = waits or f"{_short(warning.filename)}:{warning.lineno}"
            elif PROTOTYPE not in str(warning.message):
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
        return result, Observed(waits=waits)

    def record(self, work: Callable[[], None]) -> Recorded:
        """See `Recorder`."""
        if self._broken:
            raise NotRecordedError(self._broken)
        self._empty()
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        present = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(present)
        reason = ""
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode=CAPTURE_MODE)
            try:
                work()
            except RuntimeError as error:
                reason = _words(error)
            try:
                graph.capture_end()
            except RuntimeError as error:
                self._broken = reason = reason or _words(error)
        present.wait_stream(self._stream)
        num_bytes = torch.cuda.memory_reserved(self.device) - before
        if not self.has_room(SPARE_BYTES):
            reason = reason or NO_MEMORY
        if reason:
            del graph
            if self._broken:
                self._unwind()
            self._empty()
            raise NotRecordedError(reason)
        self._num_recorded += 1
        self._pool_bytes += num_bytes
        return Recorded(replay=graph.replay, num_bytes=num_bytes)

    def _unwind(self) -> None:
        """Tell the allocator and the generator that a recording is over which the driver threw
        away: torch 2.11 forgets to. It would neither free nor reuse memory from then on, nor draw.
        """
        index = self.device.index or 0
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())  # a clone is in no recording
        steps = [torch._C._cuda_endAllocateToPool]
        if self._num_recorded == 0:
            steps.append(torch._C._cuda_releasePool)
        for step in steps:
            # Raises where torch has done it by itself.
            with suppress(RuntimeError):
                step(index, self._pool)

    def has_room(self, num_bytes: int) -> bool:
        """See `Recorder`: what is there is cached then, for whoever asks next."""
        try:
            torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            return False
        return True

    def release(self) -> None:
        """See `Recorder`."""
        before = torch.cuda.memory_reserved(self.device)
        self._empty()
        given = before - torch.cuda.memory_reserved(self.device)
        if self._broken and self._num_recorded and given < self._pool_bytes // 2:
            # The recording that was thrown away still counts as one of the pool's (`_unwind`).
            with suppress(RuntimeError):
                torch._C._cuda_releasePool(self.device.index or 0, self._pool)
            self._empty()

    def _empty(self) -> None:
        """Cached memory goes back to the device."""
        torch.cuda.synchronize(self.device)
        gc.collect()
        torch.cuda.empty_cache()


def recorder_of(place: Placement, model: nn.Module) -> CudaRecorder | str:
    """Who records this model's passes, or why nobody can; an empty text where there is no GPU."""
    if place.device.type != "cuda":
        return ""
    if type(place) is not Single:
        return "this placement moves weights or rows during a pass"
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, Recomputed) and forward.done is not None:
            return "activations travel to host memory"
        if (isinstance(forward, Recomputed) and forward.may_draw) or (
            isinstance(forward, Tiled) and forward.draws
        ):
            return "blocks that draw random numbers are computed again in backward"
    return CudaRecorder(place.device)


def _words(error: RuntimeError) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return NO_MEMORY
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _short(filename: str) -> str:
    """The last folder and name of a source file."""
    return "/".join(Path(filename).parts[-2:])
