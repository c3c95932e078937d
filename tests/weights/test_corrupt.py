"""Damaged, foreign and incomplete checkpoints: one line each, before any data is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nibble.errors import WeightError
from nibble.weights import open_weights, safetensors_source, stream
from nibble.weights.safetensors_source import SafetensorsSource

GOOD = {"layers.0.weight": torch.ones(4, 3), "layers.1.weight": torch.ones(4, 3)}


class Skeleton(nn.Module):
    """Two linears, the first one's weight shared with the head."""

    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 4, bias=False, device="meta") for _ in "ab")
        self.head = nn.Linear(3, 4, bias=False, device="meta")
        self.head.weight = self.layers[0].weight


def write(folder: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def refused(folder: Path) -> str:
    with pytest.raises(WeightError) as caught:
        source = open_weights(folder)
        source.native = True
        list(stream(source, Skeleton()))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_damaged_files(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"123")
    assert "no whole safetensors file" in refused(tmp_path)
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert "no whole safetensors file" in refused(tmp_path)
    write(tmp_path, b"{ broken", b"")
    assert "damaged header" in refused(tmp_path)
    write(tmp_path, [1, 2], b"")
    assert "damaged header" in refused(tmp_path)
    write(tmp_path, {"a": {"dtype": "F32"}}, b"")
    assert "damaged header" in refused(tmp_path)
    write(tmp_path, {"a": entry([2], 0, 4)}, b"0000")
    assert "do not hold [2]" in refused(tmp_path)
    write(tmp_path, {"a": entry([-1], 0, -4)}, b"")
    assert "damaged header" in refused(tmp_path)
    write(tmp_path, {"a": entry([1], 0, 4, "F33")}, b"0000")
    assert "unknown dtype F33" in refused(tmp_path)


@pytest.mark.parametrize("kept", [-1, -20, 9, 40])
def test_truncated_anywhere(tmp_path: Path, kept: int) -> None:
    save_file(GOOD, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:kept])
    assert "fetch it again" in refused(tmp_path)


def test_bytes_too_many(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "model.safetensors")
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "longer than its header says" in refused(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(WeightError, match="ended while it was read"):
        source.read("layers.1.weight")


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    assert "no .safetensors" in refused(tmp_path)
    save_file(GOOD, tmp_path / "model-00001-of-00003.safetensors")
    assert "holds 1 of 3 shards" in refused(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    first, second = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
    index.write_text(json.dumps({"weight_map": {"layers.0.weight": first, "x": second}}))
    assert f"names {second}" in refused(tmp_path)
    index.write_text(json.dumps({"weight_map": {"layers.0.weight": first, "x": first}}))
    assert "promises x" in refused(tmp_path)
    index.write_text("{}")
    assert "is damaged" in refused(tmp_path)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    def given(**tensors: Tensor) -> str:
        save_file(GOOD | tensors, tmp_path / "model.safetensors")
        return refused(tmp_path)

    wide = given(**{"layers.1.weight": torch.ones(4, 5)})
    assert "[4, 5]" in wide and "[4, 3]" in wide and "layers.1.weight" in wide
    assert "stored as int64" in given(**{"layers.1.weight": torch.ones(4, 3, dtype=torch.int64)})
    float8 = torch.ones(4, 3).to(torch.float8_e4m3fn)
    assert "stored as float8_e4m3fn" in given(**{"layers.1.weight": float8})
    extra = given(**{"layers.2.weight": torch.ones(4, 3)})
    assert "layers.2.weight" in extra and "does not have" in extra
    save_file({"layers.0.weight": torch.ones(4, 3)}, tmp_path / "model.safetensors")
    assert "lacks 1 of 2" in refused(tmp_path)


def test_ties_and_stale_buffers(tmp_path: Path) -> None:
    def names(tensors: dict[str, Tensor]) -> list[str]:
        save_file(tensors, tmp_path / "model.safetensors")
        source = open_weights(tmp_path)
        source.native = True
        return [name for name, _ in stream(source, Skeleton())]

    expected = ["layers.0.weight", "layers.1.weight"]
    assert names(GOOD) == expected
    assert names(GOOD | {"head.weight": torch.ones(4, 3)}) == expected
    only_alias = {"head.weight": torch.ones(4, 3), "layers.1.weight": torch.ones(4, 3)}
    assert names(only_alias) == expected
    stale = {"layers.0.rotary_emb.inv_freq": torch.ones(2), "h.0.attn.masked_bias": torch.ones(1)}
    assert names(GOOD | stale) == expected
    save_file(GOOD | {"head.weight": torch.zeros(4, 3)}, tmp_path / "model.safetensors")
    assert "tie_word_embeddings" in refused(tmp_path)


def test_pieces_are_read_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_source, "PIECE_BYTES", 1000)
    tensor = torch.randn(301, 17)
    save_file({"w": tensor, "v": torch.ones(3)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    assert torch.equal(source.read("w"), tensor)  # type: ignore[arg-type]
    assert torch.equal(source.read("w", slice(100, 300)), tensor[100:300])  # type: ignore[arg-type]
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(WeightError, match="ended while it was read"):
        source.read("w")
