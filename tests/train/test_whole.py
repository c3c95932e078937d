"""Whole tensors on disk: parts of any number of processes in, slices for any other number out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nibble.optim.shards import FLAT
from nibble.place.shard_views import part
from nibble.train.whole import (
    ABSMAX,
    CODES,
    Piece,
    WholeFile,
    _decoded,
    encoded_blocks,
    in_one_codec,
    write_whole,
)


@dataclass
class Together:
    """A stand-in for the first of several processes that knows what the others would send."""

    others: list[dict[str, Piece]]
    rank: int = 0
    asked: list[str] = field(default_factory=list)

    @property
    def num_parts(self) -> int:
        return 1 + len(self.others)

    @property
    def group(self) -> Any:
        def gather(mine: Any, what: str) -> list[Any]:
            if isinstance(mine, tuple):  # which states are coded and which are plain
                return [mine, *(self.codecs(pieces) for pieces in self.others)]
            sizes = [
                {n: p.tensor.shape[p.dim] for n, p in pieces.items() if p.dim is not None}
                for pieces in self.others
            ]
            return [mine, *sizes]

        return SimpleNamespace(gather=gather)

    def codecs(self, pieces: dict[str, Piece]) -> tuple[set[str], set[str]]:
        coded = {n.removesuffix(CODES) for n in pieces if n.endswith(CODES)}
        plain = {n for n in pieces if not n.endswith((CODES, ABSMAX))}
        return coded, plain

    def whole(self, own: Tensor, dim: int | None, sizes: Sequence[int]) -> Tensor:
        if dim is None or not self.others:
            return own
        name = next(n for n, p in self.mine.items() if p.tensor is own)
        parts = [own, *(pieces[name].tensor for pieces in self.others)]
        assert [p.shape[dim] for p in parts] == list(sizes)
        return torch.cat(parts, dim=dim)

    mine: dict[str, Piece] = field(default_factory=dict)


def written(path: Path, parts: list[dict[str, Piece]]) -> WholeFile:
    """The file that so many processes write."""
    place = Together(others=parts[1:], mine=parts[0])
    sizes = write_whole(path, parts[0], place)  # type: ignore[arg-type]
    return WholeFile(path, sizes)


def cut(whole: Tensor, world: int, dim: int) -> list[Tensor]:
    found = []
    for rank in range(world):
        own = part(whole.shape, dim, rank=rank, world=world)
        found.append(own.of(whole).contiguous())
    return found


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("saved", [1, 2, 3, 5])
def test_slices_of_any_cut_are_those_of_the_whole(dim: int, saved: int, tmp_path: Path) -> None:
    whole = torch.arange(7.0 * 9).view(7, 9).bfloat16()
    parts = [
        {"w": Piece(tensor=t, dim=dim), "same": Piece(tensor=torch.tensor(3))}
        for t in cut(whole, saved, dim)
    ]
    file = written(tmp_path / "f.safetensors", parts)
    assert torch.equal(file.read("w"), whole) and int(file.read("same")) == 3
    for world in (1, 2, 4, 8):
        for rank in range(world):
            own = part(whole.shape, dim, rank=rank, world=world)
            assert torch.equal(file.read("w", dim, own.rows), own.of(whole))


def coded(values: Tensor, dim: int) -> dict[str, Piece]:
    codes, absmax = encoded_blocks(values, "exp_avg")
    return {
        "w/exp_avg_codes": Piece(tensor=codes, dim=dim),
        "w/exp_avg_absmax": Piece(tensor=absmax, dim=0),
    }


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("saved", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_8bit_state_is_exact_for_the_same_cut_and_close_for_another(
    dim: int, saved: int, world: int, tmp_path: Path
) -> None:
    """Rows of 150 do not end where blocks of 256 do. Another cut is encoded a second time: an error
    of the codec's step, which is below 2 % of what a block's largest value is."""
    whole = torch.randn(50, 150, generator=torch.Generator().manual_seed(0))
    file = written(tmp_path / "f.safetensors", [coded(t, dim) for t in cut(whole, saved, dim)])
    again = []
    for rank in range(world):
        own = part(whole.shape, dim, rank=rank, world=world)
        found = file.read_slot("w/exp_avg", dim, own.rows, as_8bit=True)
        if saved == world:
            expected = coded(own.of(whole).contiguous(), dim)
            for key, tensor in found.items():
                assert torch.equal(tensor, expected[f"w/{key}"].tensor)
        again.append(file.read_slot("w/exp_avg", dim, own.rows, as_8bit=False)["exp_avg"])
    values = torch.cat(again, dim=dim)
    assert (values - whole).abs().max() < 0.02 * whole.abs().max()
    assert not torch.equal(values, whole)


@pytest.mark.parametrize("saved", [0, 1, FLAT])
@pytest.mark.parametrize("read", [None, 0, 1, FLAT])
@pytest.mark.parametrize("as_8bit", [False, True])
def test_8bit_state_is_read_along_another_dim_or_whole(
    saved: int, read: int | None, as_8bit: bool, tmp_path: Path
) -> None:
    """Sharded by rows, columns or in a line, a run goes on in one process or cut otherwise."""
    whole = torch.randn(50, 150, generator=torch.Generator().manual_seed(0))
    if saved == FLAT:
        line = whole.reshape(-1)
        parts = [coded(t.contiguous(), FLAT) for t in (line[:3800], line[3800:])]
        codes = [p["w/exp_avg_codes"] for p in parts]
        for pieces, code in zip(parts, codes, strict=True):
            pieces["w/exp_avg_codes"] = Piece(tensor=code.tensor, dim=FLAT, shape=whole.shape)
    else:
        parts = [coded(t.contiguous(), saved) for t in cut(whole, 2, saved)]
    path = tmp_path / "f.safetensors"
    place = Together(others=parts[1:], mine=parts[0])
    sizes = write_whole(path, parts[0], place)  # type: ignore[arg-type]
    name = "w/exp_avg_codes"
    file = WholeFile(path, {name: sizes[name]}, {name: saved})
    rows = None if read is None else slice(20, 40)
    found = file.read_slot("w/exp_avg", read, rows, as_8bit=as_8bit)
    expected = whole.reshape(-1) if read == FLAT else whole
    if read is not None:
        expected = expected[:, rows] if read == 1 else expected[rows]
    if as_8bit:
        found = {"exp_avg": _decoded(found["exp_avg_codes"], found["exp_avg_absmax"], "exp_avg")}
    assert found["exp_avg"].shape == expected.shape
    # Coded once or twice, each time to less than 2 % of a block's largest value.
    assert (found["exp_avg"] - expected).abs().max() < 0.03 * whole.abs().max()


def test_a_part_too_small_for_8_bits_decodes_the_others(tmp_path: Path) -> None:
    whole = torch.randn(50, 150, generator=torch.Generator().manual_seed(0))
    large, small = whole[:40], whole[40:]
    mine = coded(large, 0)
    other = {"w/exp_avg": Piece(tensor=small, dim=0)}
    place = Together(others=[other], mine=mine)
    assert in_one_codec(mine, place) == ["w/exp_avg"]  # type: ignore[arg-type]
    file = written(tmp_path / "f.safetensors", [mine, other])
    values = file.read_slot("w/exp_avg", 0, slice(0, 50), as_8bit=False)["exp_avg"]
    assert torch.equal(values[40:], small)
    assert 0 < (values[:40] - large).abs().max() < 0.02 * large.abs().max()
