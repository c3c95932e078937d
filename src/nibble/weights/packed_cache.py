"""The packed base kept on disk, so that the next start reads it instead of packing it again.

    FOLDER/<key>.safetensors    codes, scales, ... of every packed linear, under their names
    FOLDER/<key>.json           checksums of each tensor, in the pieces in which it was written;
                                written last, so it vouches for the rest

    key = sha256(packing version, files of the checkpoint (name, size, time), configuration,
                 format, names and shapes of the packed linears, kind of device)

so a changed checkpoint or recipe is another key and nothing is ever stale. A file has a place for
every tensor from the beginning; each process writes the rows that it packed, in a thread beside the
training, and whoever ends last gives the file its name. A full or read-only disk costs the cache
and not the run. What is read is compared with its checksum: a damaged entry is an error that says
what to delete, as part of it may be in use by then.

Reading is in stored.py. `nibble` removes only entries that were left unfinished.
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from nibble.errors import WeightError
from nibble.nn.quant import PackedWeight
from nibble.spec.formats import DTYPE_BYTES, FormatSpec
from nibble.weights.safetensors_source import PIECE_BYTES, Extent, read_header
from nibble.weights.stored import Pieces, StoredTensors

PACKING_VERSION = 1
"""Raised whenever the same weight would give other packed tensors."""
QUEUE_BYTES = 1 << 30
"""Copies of tensors that wait to be written; the loader waits for them."""
LEFT_OVER_S = 24 * 3600
WORDS = {"uint8": "U8", "int8": "I8", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}


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


def open_cache(folder: Path, key: str, spec: FormatSpec) -> dict[str, PackedWeight]:
    """The packed weights of an entry by name, unread; empty when there is no whole entry."""
    try:
        checksums = json.loads((folder / f"{key}.json").read_text())
        extents = read_header(folder / f"{key}.safetensors")
        weights: dict[str, tuple[dict[str, Extent], dict[str, Pieces]]] = {}
        for full_name, extent in extents.items():
            name, _, leaf = full_name.rpartition(".")
            found = weights.setdefault(name, ({}, {}))
            known = tuple((int(length), int(sum_)) for length, sum_ in checksums[full_name])
            found[0][leaf], found[1][leaf] = extent, known
    except (OSError, ValueError, KeyError, TypeError, WeightError):
        return {}
    return {
        name: PackedWeight(spec=spec, tensors=StoredTensors(*parts))
        for name, parts in weights.items()
    }


@dataclass(frozen=True, kw_only=True)
class _Job:
    full_name: str
    first_row: int
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
        self._checksums: dict[str, list[tuple[int, int, int]]] = {}
        """Where each piece begins in its tensor, its length, its checksum."""
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._room = threading.Semaphore(QUEUE_BYTES >> 20)
        self._failed = False
        self._thread = threading.Thread(target=self._write_all, name="nibble-packed-cache")
        self._thread.start()

    def add(self, name: str, tensors: Mapping[str, Tensor], *, first_row: int = 0) -> None:
        """Write a packed weight, or its rows from `first_row` on, whose tensors no longer change;
        those on a device are copied.
        """
        for leaf, tensor in tensors.items():
            if self._failed:
                return
            is_copy = tensor.device.type != "cpu"
            if is_copy:
                for _ in range(_room_of(tensor)):
                    self._room.acquire()
            held = tensor.detach().cpu() if is_copy else tensor.detach()
            self._jobs.put(
                _Job(full_name=f"{name}.{leaf}", first_row=first_row, tensor=held, is_copy=is_copy)
            )

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
        begin = job.first_row * (len(view) // max(1, job.tensor.shape[0]))
        offset, found = self._offsets[job.full_name][0] + begin, 0
        for start in range(0, len(view), PIECE_BYTES):
            piece, done = view[start : start + PIECE_BYTES], 0
            found = zlib.crc32(piece, found)
            while done < len(piece):
                done += os.pwrite(handle, piece[done:], offset + start + done)
        self._checksums.setdefault(job.full_name, []).append((begin, len(view), found))

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
            pieces: dict[str, list[list[int]]] = {name: [] for name in self._offsets}
            for path in told:
                for name, own in json.loads(path.read_text()).items():
                    pieces[name] += own
            checksums = {name: _joined(own) for name, own in pieces.items()}
            if all(
                sum(length for length, _ in checksums[name]) == size
                for name, (_, size) in self._offsets.items()
            ):
                self._unnamed.rename(self._folder / f"{self._key}.safetensors")
                vouched = self._folder / f".writing-{self._key}-{os.getpid()}.json"
                vouched.write_text(json.dumps(checksums))
                vouched.rename(self._folder / f"{self._key}.json")
            for path in told:
                path.unlink()


def _joined(pieces: list[list[int]]) -> list[tuple[int, int]]:
    """Lengths and checksums of pieces that follow each other from the beginning on."""
    found: list[tuple[int, int]] = []
    end = 0
    for begin, length, checksum in sorted(pieces):
        if begin == end:
            found.append((length, checksum))
            end += length
    return found


def _layout(
    spec: FormatSpec, linears: Mapping[str, tuple[int, int]]
) -> tuple[bytes, dict[str, tuple[int, int]], int]:
    """The file's header, where each tensor begins in it and how long it is, and its length."""
    header: dict[str, object] = {"__metadata__": {"format": repr(spec)}}
    begins: dict[str, tuple[int, int]] = {}
    end = 0
    for name, shape in linears.items():
        for leaf, tensor in spec.tensors(shape).items():
            size = prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
            header[f"{name}.{leaf}"] = {
                "dtype": WORDS[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [end, end + size],
            }
            begins[f"{name}.{leaf}"] = (end, size)
            end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    offsets = {name: (start + begin, size) for name, (begin, size) in begins.items()}
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
