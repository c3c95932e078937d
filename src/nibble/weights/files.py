"""Writing safetensors so that a half-written file is never taken for a whole one.

A file is written under a temporary name in the same folder, flushed to the disk and renamed; a
failure removes it. Free space is compared with the bytes to write before the first one. Shards are
written with their header first, which needs only names and shapes, and then each tensor at its
place as it comes, in any order: the peak is one tensor on the host. The index is written last, so a
folder without all its shards has no index.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from nibble.errors import CheckpointError, ExportError, NibbleError
from nibble.spec.units import GIB

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
MARGIN_BYTES = 16 * 2**20
WRITE_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape and type of a tensor that is still to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors_atomic(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    error: type[NibbleError] = CheckpointError,
) -> None:
    """Write one safetensors file whole or not at all. Raises `error` when the disk is full or
    cannot be written."""
    shapes = {n: Shape(shape=tuple(t.shape), dtype=t.dtype) for n, t in tensors.items()}
    check_free_space(path.parent, sum(s.num_bytes for s in shapes.values()), error=error)
    header, offsets = _header(shapes, metadata)
    with atomic(path, error=error) as file:
        file.write(header)
        for name in offsets:
            _write_tensor(file, tensors[name])


def write_in_turn(
    path: Path, shapes: Mapping[str, Shape], *, metadata: Mapping[str, str] | None = None
) -> Callable[[str, Tensor], None]:
    """Begin a safetensors file; call what is returned for each tensor, in any order.

    The file is whole when every name of `shapes` has come. Raises OSError when the disk is full.
    """
    header, offsets = _header(shapes, metadata)
    with path.open("wb") as file:
        file.write(header)

    def write(name: str, tensor: Tensor) -> None:
        stated = shapes[name]
        assert (tuple(tensor.shape), tensor.dtype) == (stated.shape, stated.dtype), name
        with path.open("r+b") as file:
            file.seek(len(header) + offsets[name])
            _write_tensor(file, tensor)

    return write


def write_sharded(
    folder: Path,
    shapes: Mapping[str, Shape],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = 4 * GIB,
    metadata: Mapping[str, str] | None = None,
    error: type[NibbleError] = ExportError,
) -> list[Path]:
    """Write model.safetensors, or its shards and index, from tensors that come one at a time;
    return the files.

    `tensors` must bring every name of `shapes` once, in any order, with the shape and type
    promised. On a failure nothing of it is left. Raises `error` when the disk is full and for a
    tensor that is missing, unknown or of another shape.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(shape.num_bytes for shape in shapes.values())
    check_free_space(folder, total, error=error)
    plan = _plan_shards(shapes, max_shard_bytes)
    names = [
        "model.safetensors" if len(plan) == 1 else f"model-{i + 1:05}-of-{len(plan):05}.safetensors"
        for i in range(len(plan))
    ]
    temporary = [folder / f".{name}.partial" for name in names]
    try:
        _write_shards(temporary, plan, tensors, metadata=metadata or {"format": "pt"}, error=error)
        for part, name in zip(temporary, names, strict=True):
            part.replace(folder / name)
        index = folder / "model.safetensors.index.json"
        if len(plan) > 1:
            weight_map = {n: names[i] for i, shard in enumerate(plan) for n in shard}
            write_json_atomic(
                index,
                {"metadata": {"total_size": total}, "weight_map": weight_map},
                error=error,
            )
        else:
            index.unlink(missing_ok=True)
        _sync_folder(folder)
    except OSError as failure:
        raise error(_reason(folder, failure)) from None
    finally:
        for part in temporary:
            part.unlink(missing_ok=True)
    return [folder / name for name in names]


def write_json_atomic(
    path: Path, value: object, *, error: type[NibbleError] = CheckpointError
) -> None:
    """Write a JSON file whole or not at all."""
    with atomic(path, error=error) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def atomic(path: Path, *, error: type[NibbleError] = CheckpointError) -> Iterator[IO[bytes]]:
    """A binary file that appears under `path` only when the block ends without an error; OSError
    becomes `error`."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as failure:
        raise error(_reason(path, failure)) from None
    finally:
        temporary.unlink(missing_ok=True)


def check_free_space(
    folder: Path, num_bytes: int, *, error: type[NibbleError] = CheckpointError
) -> None:
    """Raise `error` when the disk under `folder` (which need not exist yet) has no room for
    `num_bytes`."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < num_bytes + MARGIN_BYTES:
        raise error(
            f"{folder} needs {num_bytes / GIB:.2f} GiB and the disk has {free / GIB:.2f} GiB "
            "free: make room or "
            "choose another folder; nothing was written"
        )


def _plan_shards(shapes: Mapping[str, Shape], max_shard_bytes: int) -> list[dict[str, Shape]]:
    """Consecutive tensors up to the limit; one larger than the limit has a shard of its own."""
    shards: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if shards[-1] and filled + shape.num_bytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += shape.num_bytes
    return shards


def _write_shards(
    files: list[Path],
    plan: list[dict[str, Shape]],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    metadata: Mapping[str, str],
    error: type[NibbleError],
) -> None:
    places: dict[str, tuple[int, int, Shape]] = {}
    for number, (path, shard) in enumerate(zip(files, plan, strict=True)):
        header, offsets = _header(shard, metadata)
        with path.open("wb") as file:
            file.write(header)
        places |= {n: (number, len(header) + offsets[n], shard[n]) for n in shard}
    for name, tensor in tensors:
        place = places.pop(name, None)
        if place is None:
            raise error(
                f"tensor {name} was not announced or came twice: this is a fault of the exporter"
            )
        number, offset, shape = place
        if tuple(tensor.shape) != shape.shape or tensor.dtype != shape.dtype:
            raise error(
                f"tensor {name} is {list(tensor.shape)} {tensor.dtype}, announced as "
                f"{list(shape.shape)} "
                f"{shape.dtype}: this is a fault of the exporter"
            )
        with files[number].open("r+b") as file:
            file.seek(offset)
            _write_tensor(file, tensor)
    if places:
        raise error(f"{len(places)} tensors never came, such as {next(iter(places))}")
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _header(
    shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int]]:
    """The header's bytes, and each tensor's offset behind it; wide types first, so that all are
    aligned."""
    order = sorted(shapes, key=lambda name: -shapes[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets = {}
    position = 0
    for name in order:
        shape = shapes[name]
        end = position + shape.num_bytes
        header[name] = {
            "dtype": CODES[shape.dtype],
            "shape": list(shape.shape),
            "data_offsets": [position, end],
        }
        offsets[name] = position
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _write_tensor(file: IO[bytes], tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    view = memoryview(flat.numpy())  # type: ignore[arg-type]
    for start in range(0, len(view), WRITE_BYTES):
        file.write(view[start : start + WRITE_BYTES])


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(path: Path, failure: OSError) -> str:
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {path} is full: make room and try again; nothing half-written was left"
    return (
        f"{path} cannot be written ({failure.strerror or failure}): check the folder and its rights"
    )
