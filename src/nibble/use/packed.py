"""The values that fill a model, from the packed cache where this base was packed before.

    in the cache   packed weights as they were, the rest from the checkpoint
    not yet        everything from the checkpoint; what was packed is kept beside the training

Whoever loads sees one stream of (name, value) either way. A process asks only for what its
placement keeps. Of several processes on a machine that hold the same rows the first one writes
them; where its processes do not hold all rows between them, and for models that are packed in a
moment, nothing is kept.
"""

from __future__ import annotations

import os
import secrets
import socket
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from nibble.nn.quant import PackedWeight, QuantLinear
from nibble.place.base import Placement
from nibble.spec.holdings import placement_kind
from nibble.weights.packed_cache import CacheWriter, cache_folder, cache_key, open_cache
from nibble.weights.stored import StoredTensors, read_ahead

if TYPE_CHECKING:
    from nibble.use.assemble import Assembly, Value

MIN_BYTES = 256 << 20
"""Smaller bases are packed in less time than a person notices."""

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """Where the base of a run lies in the cache, and what it holds."""

    folder: Path
    key: str
    linears: dict[str, tuple[int, int]]


def values(
    assembly: Assembly, place: Placement, *, note: Note = lambda text: None
) -> Iterator[tuple[str, Value]]:
    """(name, value) of what this process keeps of the base; the model must be arranged.

    All processes iterate together. `note` is told what became of the cache.
    """
    model = assembly.model

    def rows(name: str) -> slice | None:
        return place.rows(model, name)

    def wanted(name: str) -> bool:
        kept = rows(name)
        return kept is None or kept.start != kept.stop

    entry = _entry(assembly, place)
    if entry is None or assembly.spec is None:
        yield from assembly.values(wanted, rows)
        return
    stored = open_cache(entry.folder, entry.key, assembly.spec)
    if int(place.sum(torch.tensor(int(bool(stored))))) == place.world:
        names = frozenset(stored)
        # Taken out, so that what was read of it goes with it.
        taken = (
            (name, _rows_of(stored.pop(name), rows(name))) for name in filter(wanted, sorted(names))
        )
        yield from read_ahead(taken) if _goes_to_device(assembly, place) else taken
        yield from assembly.values(lambda name: name not in names and wanted(name), rows)
        return
    writer = _writer(assembly, place, entry, note)
    yield from _kept(assembly, place, writer, wanted)


def _goes_to_device(assembly: Assembly, place: Placement) -> bool:
    """Whether weights leave host memory as they come; others are read to where they stay."""
    kind = placement_kind(assembly.recipe.place, place.world)
    return place.device.type != "cpu" and kind in ("single", "ddp", "fsdp")


def _rows_of(packed: PackedWeight, rows: slice | None) -> PackedWeight:
    """The rows of a packed weight, which are a packed weight; the others are not read."""
    if rows is None or not isinstance(packed.tensors, StoredTensors):
        return packed
    return PackedWeight(spec=packed.spec, tensors=packed.tensors.rows(rows))


def _kept(
    assembly: Assembly, place: Placement, writer: _Writer | None, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, Value]]:
    """Values from the checkpoint, each one kept when the placement has packed it."""
    model, whole = assembly.model, False
    try:
        for name, value in assembly.values(wanted, lambda name: place.rows(model, name)):
            yield name, value
            if writer is not None and name in writer.first_rows:
                if isinstance(value, PackedWeight):
                    writer.thread.abandon()  # the checkpoint itself is packed
                    writer = None
                else:
                    own = place.packed(model, name)
                    writer.thread.add(name, own, first_row=writer.first_rows[name])
        whole = True
    finally:
        if writer is not None:
            writer.thread.close() if whole else writer.thread.abandon()


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """The thread that writes, and from which row on which weights are this process's to write."""

    thread: CacheWriter
    first_rows: dict[str, int]


def _entry(assembly: Assembly, place: Placement) -> _Entry | None:
    """The run's place in the cache; None where nothing is to be kept."""
    spec, recipe = assembly.spec, assembly.recipe
    if spec is None or assembly.weights is None or not recipe.quant.cache:
        return None
    linears = packed_linears(assembly.model)
    if sum(spec.nbytes(shape) for shape in linears.values()) < MIN_BYTES:
        return None
    try:
        key = cache_key(assembly.built.path, spec=spec, linears=linears, device=place.device.type)
    except OSError:
        key = ""
    # All processes of a run must come to the same decision.
    if int(place.sum(torch.tensor(int(bool(key))))) < place.world:
        return None
    return _Entry(folder=cache_folder(), key=key, linears=linears)


def packed_linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The shape (out, in) of every packed weight, by the checkpoint's name."""
    return {
        f"{name.removesuffix('.base')}.weight": module.shape
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
    }


def _writer(assembly: Assembly, place: Placement, entry: _Entry, note: Note) -> _Writer | None:
    """What this process is to write; None when the machine's processes do not hold all of it."""
    names = list(entry.linears)
    rank, world = place.rank, place.world
    here = zlib.crc32(f"{socket.gethostname()} {_boot()}".encode())
    table = torch.zeros(world, 2 * len(names) + 2, dtype=torch.int64)
    table[rank, 0] = here
    table[rank, 1] = secrets.randbits(62) if rank == 0 else 0
    for number, name in enumerate(names):
        rows = place.rows(assembly.model, name) or slice(0, entry.linears[name][0])
        table[rank, 2 + 2 * number] = rows.start
        table[rank, 3 + 2 * number] = rows.stop
    table = place.sum(table)
    together = [other for other in range(world) if int(table[other, 0]) == here]
    mine = together.index(rank)
    held = table[together, 2:].view(len(together), len(names), 2).tolist()
    first_rows: dict[str, int] = {}
    for number, name in enumerate(names):
        writers = _cover([one[number] for one in held], entry.linears[name][0])
        if writers is None:
            return None
        if mine in writers:
            first_rows[name] = held[mine][number][0]
    assert assembly.spec is not None
    thread = CacheWriter(
        entry.folder,
        entry.key,
        spec=assembly.spec,
        linears=entry.linears,
        token=f"{int(table[0, 1]):x}",
        part=mine,
        parts=len(together),
        note=note,
    )
    return _Writer(thread=thread, first_rows=first_rows)


def _cover(rows: list[list[int]], num_rows: int) -> set[int] | None:
    """Which of the processes that hold [start, stop) write all rows between them; None if some
    rows are nobody's."""
    writers: set[int] = set()
    at = 0
    while at < num_rows:
        reach = {i: stop for i, (start, stop) in enumerate(rows) if start == at < stop}
        if not reach:
            return None
        first = min(i for i, stop in reach.items() if stop == max(reach.values()))
        writers.add(first)
        at = reach[first]
    return writers


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else str(os.getppid())
