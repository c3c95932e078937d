"""The packed base kept on disk, so that the next start reads it instead of packing it again.

    FOLDER/<key>.safetensors    codes, scales, ... of every packed linear, under their names
    FOLDER/<key>.json           a checksum of each tensor; written last, so it vouches for the rest

    key = sha256(packing version, files of the checkpoint (name, size, time), configuration,
                 format, names and shapes of the packed linears, kind of device)

so a changed checkpoint or recipe is another key and nothing is ever stale. A file has a place for
every tensor from the beginning; each process writes the rows that it packed, in a thread beside the
training, and whoever ends last gives the file its name. A full or read-only disk costs the cache
and not the run. What is read is compared with its checksum: a damaged entry is an error that says
what to delete, as part of it may be in use by then.

Reading goes straight into the memory that keeps the tensor where that is host memory; never through
a memory map, whose pages would count as the run's. What goes on to a device is read ahead by a few
threads, as comparing takes longer than copying. `nibble` removes only entries that were left
unfinished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from nibble.errors import WeightError
from nibble.nn.quant import PackedWeight
from nibble.spec.formats import DTYPE_BYTES, FormatSpec
from nibble.weights.safetensors_source import Extent, read_header

PACKING_VERSION = 1
"""Raised whenever the same weight would give other packed tensors."""
QUEUE_BYTES = 1 << 30
"""Copies of tensors that wait to be written; the loader waits for them."""
LEFT_OVER_S = 24 * 3600
WORDS = {"uint8": "U8", "int8": "I8", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}
PIECE_BYTES = 64 << 20
NUM_READERS = 8
NUM_AHEAD = 16
"""Weights that are read before they are asked for: half a GiB of an 8B."""


def cache_folder() -> Path:
    """Where entries lie: the folder NIBBLE_CACHE names, else the user's cache."""
    own = os.environ.get("NIBBLE_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "nibble"
    return base.expanduser() / "packed"


def cache_contents(folder: Path) -> tuple[int, int]:
    """How many packed bases lie in a cache, and the bytes of all its files, unfinished ones too."""
    sizes: list[int] = []
    num_bases = 0
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):  # another process may take one away
                sizes.append(path.stat().st_size)
                num_bases += path.suffix == ".safetensors"
    return num_bases, sum(sizes)


def cache_key(
    path: Path, *, spec: FormatSpec, linears: Mapping[str, tuple[int, int]], device: str
) -> str:
    """The name of the entry for these linears of the checkpoint at `path` (a folder or a file)."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    config = path / "config.json"
    words = {
        "version": PACKING_VERSION,
        # A hub's files are links to blobs that are named by their content.
        "files": [(f.resolve().name, f.stat().st_size, f.stat().st_mtime_ns) for f in files],
        "config": hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else "",
        "spec": repr(spec),
        "linears": {name: list(shape) for name, shape in linears.items()},
        "device": device,
    }
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:40]


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one packed weight in a file: read when asked for, and compared."""

    def __init__(self, extents: Mapping[str, Extent], checksums: Mapping[str, int]) -> None:
        self._extents, self._checksums = extents, checksums
        self._read: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """Read into fresh host memory, once."""
        if name not in self._read:
            entry = self._extents[name].entry
            made = torch.empty(entry.shape, dtype=entry.dtype)
            self.read_into(name, made)
            self._read[name] = made
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._extents)

    def __len__(self) -> int:
        """How many tensors."""
        return len(self._extents)

    def entry(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type, without reading."""
        entry = self._extents[name].entry
        return entry.shape, entry.dtype

    def rows(self, rows: slice) -> StoredTensors:
        """Only these rows of each tensor. A checksum is of a whole tensor: part of one is read
        without being compared.
        """
        return StoredTensors({name: e.of_rows(rows) for name, e in self._extents.items()}, {})

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill a contiguous host tensor of this shape and type; threads may do so side by side.

        Raises WeightError when the file is shorter or other than what was written.
        """
        extent = self._extents[name]
        view = memoryview(target.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        found = 0
        with extent.file.open("rb", buffering=0) as file:
            for start in range(0, extent.num_bytes, PIECE_BYTES):
                piece = view[start : min(start + PIECE_BYTES, extent.num_bytes)]
                done = 0
                while done < len(piece):
                    count = os.preadv(file.fileno(), [piece[done:]], extent.offset + start + done)
                    if count == 0:
                        break
                    done += count
                found = zlib.crc32(piece, found)
        if found != self._checksums.get(name, found):
            raise WeightError(
                f"{extent.file} is damaged at {name}: delete it, and the next start packs again"
            )


def open_cache(folder: Path, key: str, spec: FormatSpec) -> dict[str, PackedWeight]:
    """The packed weights of an entry by name, unread; empty when there is no whole entry."""
    try:
        checksums = json.loads((folder / f"{key}.json").read_text())
        extents = read_header(folder / f"{key}.safetensors")
        weights: dict[str, tuple[dict[str, Extent], dict[str, int]]] = {}
        for full_name, extent in extents.items():
            name, _, leaf = full_name.rpartition(".")
            found = weights.setdefault(name, ({}, {}))
            found[0][leaf], found[1][leaf] = extent, int(checksums[full_name])
    except (OSError, ValueError, KeyError, WeightError):
        return {}
    return {
        name: PackedWeight(spec=spec, tensors=StoredTensors(*parts))
        for name, parts in weights.items()
    }


def read_ahead(weights: Iterable[tuple[str, PackedWeight]]) -> Iterator[tuple[str, PackedWeight]]:
    """The same weights in the same order, those that come next being read meanwhile.

    Raises WeightError for a damaged one when its turn comes.
    """
    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="nibble-reader") as pool:
        waiting: deque[tuple[str, PackedWeight, list[Future[Tensor]]]] = deque()

        def first() -> tuple[str, PackedWeight]:
            name, packed, reads = waiting.popleft()
            for read in reads:
                read.result()
            return name, packed

        for name, packed in weights:
            reads = [pool.submit(packed.tensors.__getitem__, leaf) for leaf in packed.tensors]
            waiting.append((name, packed, reads))
            if len(waiting) > NUM_AHEAD:
                yield first()
        while waiting:
            yield first()


@dataclass(frozen=True, kw_only=True)
class _Job:
    full_name: str
    tensor: Tensor
    is_copy: bool


class CacheWriter:
    """What one process puts into a new entry, in a thread; `close` says that nothing follows.

    `token` is the same for all processes of the run and differs between runs; `part` of `parts`
    writes `mine`. `note` is told when the entry could not be written.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        *,
        spec: FormatSpec,
        linears: Mapping[str, tuple[int, int]],
        token: str,
        part: int,
        parts: int,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._folder, self._key, self._note = folder, key, note
        self._part, self._parts = part, parts
        self._header, self._offsets, self._num_bytes = _layout(spec, linears)
        self._unnamed = folder / f".writing-{key}-{token}"
        self._checksums: dict[str, int] = {}
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._room = threading.Semaphore(QUEUE_BYTES >> 20)
        self._failed = False
        self._thread = threading.Thread(target=self._write_all, name="nibble-packed-cache")
        self._thread.start()

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a packed weight whose tensors no longer change; those on a device are copied."""
        for leaf, tensor in tensors.items():
            if self._failed:
                return
            is_copy = tensor.device.type != "cpu"
            if is_copy:
                for _ in range(_room_of(tensor)):
                    self._room.acquire()
            held = tensor.detach().cpu() if is_copy else tensor.detach()
            self._jobs.put(_Job(full_name=f"{name}.{leaf}", tensor=held, is_copy=is_copy))

    def close(self) -> None:
        """Nothing follows; the thread ends when all is written."""
        self._jobs.put(None)

    def abandon(self) -> None:
        """The entry will not be whole: what has been written goes."""
        self._failed = True
        self._jobs.put(None)

    def join(self) -> None:
        """Wait for the thread."""
        self._thread.join()

    def _write_all(self) -> None:
        handle = -1
        try:
            handle = self._open()
            while (job := self._jobs.get()) is not None:
                try:
                    if not self._failed:
                        self._write(handle, job)
                finally:
                    if job.is_copy:
                        for _ in range(_room_of(job.tensor)):
                            self._room.release()
                del job
            if not self._failed:
                os.fsync(handle)
                self._finish()
        except OSError as error:
            self._fail(error)
        finally:
            if handle >= 0:
                os.close(handle)
            if self._failed:
                with contextlib.suppress(OSError):
                    self._unnamed.unlink()

    def _fail(self, error: OSError) -> None:
        """Say so once, and let whoever waits for room go on."""
        self._failed = True
        self._room.release(QUEUE_BYTES >> 20)
        self._note(f"the packed base is not kept on disk ({error.strerror or error})")

    def _open(self) -> int:
        self._folder.mkdir(parents=True, exist_ok=True)
        _remove_left_over(self._folder)
        handle = os.open(self._unnamed, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        room = os.fstatvfs(handle)
        if room.f_bavail * room.f_frsize < self._num_bytes:
            os.close(handle)
            raise OSError(28, f"{self._num_bytes >> 20} MiB do not fit in {self._folder}")
        os.ftruncate(handle, self._num_bytes)
        os.pwrite(handle, self._header, 0)
        return handle

    def _write(self, handle: int, job: _Job) -> None:
        flat = job.tensor.contiguous().reshape(-1).view(torch.uint8)
        view = memoryview(flat.numpy())  # type: ignore[arg-type]
        offset, found = self._offsets[job.full_name], 0
        for start in range(0, len(view), PIECE_BYTES):
            piece, done = view[start : start + PIECE_BYTES], 0
            found = zlib.crc32(piece, found)
            while done < len(piece):
                done += os.pwrite(handle, piece[done:], offset + start + done)
        self._checksums[job.full_name] = found

    def _finish(self) -> None:
        """This part is whole; if all are, the entry gets its name."""
        mine = Path(f"{self._unnamed}.part-{self._part}")
        unnamed = mine.with_name(f"{mine.name}.new")
        unnamed.write_text(json.dumps(self._checksums))
        unnamed.rename(mine)
        told = [Path(f"{self._unnamed}.part-{part}") for part in range(self._parts)]
        if not all(path.is_file() for path in told):
            return
        with contextlib.suppress(FileNotFoundError):  # another part came to the same end
            checksums: dict[str, int] = {}
            for path in told:
                checksums |= json.loads(path.read_text())
            if checksums.keys() == self._offsets.keys():
                self._unnamed.rename(self._folder / f"{self._key}.safetensors")
                vouched = self._folder / f".writing-{self._key}-{os.getpid()}.json"
                vouched.write_text(json.dumps(checksums))
                vouched.rename(self._folder / f"{self._key}.json")
            for path in told:
                path.unlink()


def _layout(
    spec: FormatSpec, linears: Mapping[str, tuple[int, int]]
) -> tuple[bytes, dict[str, int], int]:
    """The file's header, where each tensor begins in it, and its length."""
    header: dict[str, object] = {"__metadata__": {"format": repr(spec)}}
    begins: dict[str, int] = {}
    end = 0
    for name, shape in linears.items():
        for leaf, tensor in spec.tensors(shape).items():
            size = prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
            header[f"{name}.{leaf}"] = {
                "dtype": WORDS[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [end, end + size],
            }
            begins[f"{name}.{leaf}"] = end
            end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    offsets = {name: start + begin for name, begin in begins.items()}
    return len(raw).to_bytes(8, "little") + raw, offsets, start + end


def _room_of(tensor: Tensor) -> int:
    """MiB that a copy takes in the queue; the largest tensor must fit."""
    return min(QUEUE_BYTES >> 20, -(-tensor.nbytes >> 20))


def _remove_left_over(folder: Path) -> None:
    """What runs that were killed have left."""
    for path in folder.glob(".writing-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFT_OVER_S:
                path.unlink()
