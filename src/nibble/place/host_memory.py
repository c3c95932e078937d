"""Host memory that all processes of a machine share, and that its cards read by themselves.

One anonymous file in memory (memfd) holds the bytes once, whatever the number of processes: the
first one makes it, the others open it through /proc (or, where that is shut, as a file in /dev/shm
whose name is removed at once), and it is gone when the last of them is, even after a crash. It is
exactly as large as what is put in it: pinned allocators round up to powers of
two, which for 35 GiB would be 64.

A card copies at the bus's full rate, and beside the computation, only from pages that cannot move.
Each process registers them with its own driver (`cudaHostRegister`), piece by piece in a thread, so
that it happens while weights are read; a copy never crosses two pieces. On a CPU nothing is
registered. Costs one pass over the pages, about 0.1 s a GiB, once.
"""

from __future__ import annotations

import mmap
import os
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nibble.errors import PlacementError
from nibble.spec.units import show_bytes

PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every context of the process."""
SPARE_BYTES = 1 << 30
"""Left to everything else on the machine."""


def available_bytes() -> int:
    """What may still be allocated on this machine, within the container's limit; Linux tells."""
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(rows.get("MemAvailable", rows["MemFree"]).split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdecimal():
        free = min(free, max(0, int(limit.read_text()) - int(used.read_text())))
    return free


def check_host_memory(num_bytes: int, *, other_bytes: int, budget_bytes: int | None) -> None:
    """Raise PlacementError unless `num_bytes` of shared memory fit beside `other_bytes` that the
    processes of this machine need: into what is free now, and into place.ram.
    """
    needed = f"the frozen weights take {show_bytes(num_bytes)} of host memory"
    if budget_bytes is not None and num_bytes + other_bytes > budget_bytes:
        raise PlacementError(
            f"{needed} beside {show_bytes(other_bytes)} of the processes, but place.ram is "
            f"{show_bytes(budget_bytes)}: raise it, or choose a format of fewer bits"
        )
    free = available_bytes()
    if num_bytes + SPARE_BYTES > free:
        raise PlacementError(
            f"{needed} and {show_bytes(free)} are free: end other programs, choose a format of "
            "fewer bits, or place.kind=fsdp over more cards"
        )


class HostMemory:
    """`num_bytes` that the processes of one machine share; `bytes` is all of them as uint8."""

    def __init__(self, handle: int, num_bytes: int, path: Path) -> None:
        """See `create` and `attach`."""
        self.handle, self.path = handle, path
        self._mapping = mmap.mmap(handle, max(1, num_bytes), flags=mmap.MAP_SHARED)
        self.bytes: Tensor = torch.frombuffer(self._mapping, dtype=torch.uint8)[:num_bytes]
        self._pins: _Pins | None = None

    @classmethod
    def create(cls, num_bytes: int, *, folder: Path | None = None) -> HostMemory:
        """New memory, all zeros, that others may open at `path`; pages are taken when written.

        `folder`: a file in there instead of an anonymous one, where /proc does not let processes
        share; to be removed (`forget`) when all have opened it.
        """
        try:
            if folder is None:
                handle = os.memfd_create("nibble", os.MFD_CLOEXEC)
                path = Path(f"/proc/{os.getpid()}/fd/{handle}")
            else:
                free = os.statvfs(folder)
                if free.f_bavail * free.f_frsize < num_bytes:
                    raise OSError(f"{folder} is too small")
                path = folder / f"nibble-{os.getpid()}-{secrets.token_hex(4)}"
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.ftruncate(handle, max(1, num_bytes))
            return cls(handle, num_bytes, path)
        except (OSError, ValueError) as error:
            raise PlacementError(
                f"{show_bytes(num_bytes)} of shared host memory could not be had: {error}"
            ) from None

    @classmethod
    def attach(cls, path: Path, num_bytes: int) -> HostMemory:
        """The memory that another process of this machine has made."""
        try:
            opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            return cls(opened, num_bytes, path)
        except (OSError, ValueError) as error:
            raise PlacementError(
                f"the host memory at {path} could not be shared ({error}): the processes of one "
                "machine must run as one user and see each other in /proc"
            ) from None

    def forget(self) -> None:
        """Take a file's name away; its memory goes with the last process that has it open."""
        self.path.unlink(missing_ok=True)

    def pin(self, pieces: Sequence[tuple[int, int]], *, device: torch.device) -> None:
        """Begin to register (start, end) pieces for `device`, in this order; page-aligned."""
        if device.type == "cuda" and pieces:
            self._pins = _Pins(self.bytes.data_ptr(), pieces, device)

    def wait_pinned(self, start: int | None = None) -> float:
        """Wait for the piece that begins at `start` (None: for all); returns the seconds that
        registering has taken so far.

        Raises PlacementError when the driver refused.
        """
        return 0.0 if self._pins is None else self._pins.wait(start)

    def close(self) -> None:
        """Unregister; the memory itself goes with its last tensor. No copy may be under way."""
        if self._pins is not None:
            self._pins.release()
            self._pins = None
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1


class _Pins:
    """The thread that registers pieces, and what it has done."""

    def __init__(
        self, address: int, pieces: Sequence[tuple[int, int]], device: torch.device
    ) -> None:
        self._address, self._device = address, device
        self._ready = {start: threading.Event() for start, _ in pieces}
        self._done: list[int] = []
        self._error: str | None = None
        self._stop = False
        self._seconds = 0.0
        self._thread = threading.Thread(
            target=self._register, args=(list(pieces),), name="nibble-pin", daemon=True
        )
        self._thread.start()

    def wait(self, start: int | None) -> float:
        for event in self._ready.values() if start is None else [self._ready[start]]:
            event.wait()
        if self._error is not None:
            raise PlacementError(self._error)
        return self._seconds

    def release(self) -> None:
        self._stop = True
        self._thread.join()
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        for start in self._done:
            runtime.cudaHostUnregister(self._address + start)
        self._done = []

    def _register(self, pieces: list[tuple[int, int]]) -> None:
        torch.cuda.set_device(self._device)
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        for start, end in pieces:
            begin = time.perf_counter()
            if self._error is None and not self._stop:
                code = runtime.cudaHostRegister(self._address + start, end - start, PORTABLE)
                if int(code) == 0:
                    self._done.append(start)
                else:
                    self._error = (
                        f"the driver pinned {len(self._done)} of {len(pieces)} pieces of host "
                        f"memory and then refused (CUDA error {int(code)}): raise the limit "
                        "on locked memory (ulimit -l), or take place.kind=fsdp"
                    )
            self._seconds += time.perf_counter() - begin
            self._ready[start].set()
