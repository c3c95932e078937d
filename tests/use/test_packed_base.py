"""The packed base on disk: the second start packs nothing, and a bad disk costs only the cache."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import recipe, rows_file, save_model
from torch import nn

from nibble.errors import WeightError
from nibble.nn import quant
from nibble.numerics.formats import pack
from nibble.place import placement
from nibble.place.activations import Activations
from nibble.place.group import Group
from nibble.spec.config import Place, Quant
from nibble.spec.formats import format_spec
from nibble.use import packed
from nibble.use.assemble import assemble, fill
from nibble.weights.packed_cache import CacheWriter, cache_folder, open_cache
from nibble.weights.stored import NUM_AHEAD, StoredTensors, read_ahead

NF4 = format_spec(Quant(format="nf4"))
assert NF4 is not None


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed, "MIN_BYTES", 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("base"))


def loaded(base: Path, kind: str, notes: list[str] | None = None, **words: Any) -> nn.Module:
    """The model of a recipe in a placement; what writes the cache has ended."""
    given = recipe(
        base, rows_file(base), base / "run", quant={"format": "nf4"} | words,
        adapter={"kind": "dora", "rank": 2},
    )  # fmt: skip
    place = placement(Place(kind=kind, device="cpu"), Group.alone(torch.device("cpu")))  # type: ignore[arg-type]
    said = notes if notes is not None else []
    model = fill(assemble(given), place, activations=Activations(policy="full"), note=said.append)
    for thread in threading.enumerate():
        if thread.name == "nibble-packed-cache":
            thread.join()
    return model


def entries() -> list[str]:
    folder = cache_folder()
    return sorted(p.suffix for p in folder.iterdir()) if folder.is_dir() else []


@pytest.mark.parametrize("first", ["single", "stream"])
@pytest.mark.parametrize("second", ["single", "stream"])
def test_the_second_start_packs_nothing(
    base: Path, first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = loaded(base, first).state_dict()
    assert entries() == [".json", ".safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(quant, "pack", lambda *_: pytest.fail("packed again"))
        found = loaded(base, second).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_another_checkpoint_format_or_wish_is_another_entry(base: Path) -> None:
    loaded(base, "single")
    loaded(base, "single", block=32)
    assert len(entries()) == 4
    file = base / "model.safetensors"
    os.utime(file, ns=(1, time.time_ns()))
    loaded(base, "single")
    assert len(entries()) == 6
    loaded(base, "single", cache=False, block=128)
    assert len(entries()) == 6


def test_what_is_damaged_is_never_used(base: Path) -> None:
    expected = loaded(base, "single").state_dict()
    file = next(cache_folder().glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    for kind in ("single", "stream"):
        with pytest.raises(WeightError, match=r"is damaged at \w+: delete it"):
            loaded(base, kind)
    # Half an entry is none: packed again, and replaced.
    file.write_bytes(raw[: len(raw) // 2])
    found = loaded(base, "stream").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    raw[-5] ^= 1
    assert file.read_bytes() == raw


def test_a_full_disk_costs_only_the_cache(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite

    def full(handle: int, piece: Any, offset: int) -> int:
        if offset > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, piece, offset)

    monkeypatch.setattr(os, "pwrite", full)
    notes: list[str] = []
    model = loaded(base, "single", notes)
    assert all(torch.isfinite(p).all() for p in model.parameters() if p.is_floating_point())
    assert notes == ["the packed base is not kept on disk (No space left on device)"]
    assert entries() == []


def test_parts_of_several_processes_make_one_entry(tmp_path: Path) -> None:
    linears = {"a.weight": (8, 64), "b.weight": (4, 128), "c.weight": (2, 64)}
    weights = {
        name: pack(NF4, torch.randn(shape, generator=torch.Generator().manual_seed(i)))
        for i, (name, shape) in enumerate(linears.items())
    }

    def part(number: int, names: list[str], token: str) -> CacheWriter:
        writer = CacheWriter(
            tmp_path, "key", spec=NF4, linears=linears, token=token, part=number, parts=2
        )
        for name in names:
            writer.add(name, weights[name])
        return writer

    first = part(0, ["a.weight"], "one")
    first.close()
    first.join()
    assert open_cache(tmp_path, "key", NF4) == {}
    killed = part(1, ["b.weight"], "one")
    killed.abandon()
    killed.join()
    assert open_cache(tmp_path, "key", NF4) == {}
    for number, names in ((1, ["c.weight", "b.weight"]), (0, ["a.weight"])):
        writer = part(number, names, "two")
        writer.close()
        writer.join()
    stored = open_cache(tmp_path, "key", NF4)
    assert stored.keys() == weights.keys()
    for name, tensors in weights.items():
        assert stored[name].tensors.keys() == tensors.keys()
        assert all(torch.equal(stored[name].tensors[leaf], tensors[leaf]) for leaf in tensors)
        part = stored[name].tensors
        assert isinstance(part, StoredTensors)
        some = part.rows(slice(1, 2))
        assert all(torch.equal(some[leaf], tensors[leaf][1:2]) for leaf in tensors)
    left = {path.suffix for path in tmp_path.iterdir()} - {".safetensors", ".json"}
    assert left <= {".part-0"}  # of the run that was killed


@pytest.mark.parametrize("rows", [(0, 3, 8), (0, 4, 4, 8)])
def test_rows_of_several_processes_make_one_entry(rows: tuple[int, ...], tmp_path: Path) -> None:
    whole = pack(NF4, torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    spans = [slice(a, b) for a, b in itertools.pairwise(rows) if a < b]
    for number in reversed(range(len(spans))):
        writer = CacheWriter(
            tmp_path, "key", spec=NF4, linears={"a.weight": (8, 64)}, token="one", part=number,
            parts=len(spans),
        )  # fmt: skip
        assert open_cache(tmp_path, "key", NF4) == {}
        own = {leaf: tensor[spans[number]] for leaf, tensor in whole.items()}
        writer.add("a.weight", own, first_row=spans[number].start)
        writer.close()
        writer.join()
    stored = open_cache(tmp_path, "key", NF4)["a.weight"].tensors
    assert isinstance(stored, StoredTensors)
    assert all(torch.equal(stored[leaf], whole[leaf]) for leaf in whole)
    raw = bytearray((tmp_path / "key.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "key.safetensors").write_bytes(raw)
    # The rows that one process wrote are compared; the first ones are whole.
    first, last = (open_cache(tmp_path, "key", NF4)["a.weight"].tensors.rows(s) for s in spans)  # type: ignore[attr-defined]
    assert all(torch.equal(first[leaf], whole[leaf][spans[0]]) for leaf in whole)
    with pytest.raises(WeightError, match="is damaged"):
        [last[leaf] for leaf in whole]


def test_rows_that_nobody_holds_make_no_entry() -> None:
    assert packed._cover([[0, 8], [0, 8]], 8) == {0}
    assert packed._cover([[0, 4], [4, 8], [4, 8]], 8) == {0, 1}
    assert packed._cover([[0, 3], [3, 6], [6, 6]], 6) == {0, 1}
    assert packed._cover([[0, 4], [0, 4]], 8) is None
    assert packed._cover([[0, 0], [0, 8]], 8) == {1}


def test_reading_ahead_gives_the_same_weights(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = loaded(base, "single").state_dict()
    monkeypatch.setattr(packed, "_goes_to_device", lambda *_: True)
    found = loaded(base, "single").state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_reading_ahead_keeps_the_order_and_a_bounded_distance(base: Path) -> None:
    loaded(base, "single")
    (entry,) = cache_folder().glob("*.safetensors")
    weights = open_cache(entry.parent, entry.stem, NF4)
    taken: list[str] = []

    def asked() -> Any:
        for name in 4 * sorted(weights):
            taken.append(name)
            yield name, weights[name]

    for number, (name, _) in enumerate(read_ahead(asked()), start=1):
        assert name == taken[number - 1]
        assert len(taken) <= number + NUM_AHEAD


def test_a_damaged_weight_that_was_read_ahead_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(base, "single")
    (entry,) = cache_folder().glob("*.safetensors")
    with entry.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    monkeypatch.setattr(packed, "_goes_to_device", lambda *_: True)
    with pytest.raises(WeightError, match="damaged"):
        loaded(base, "single")
