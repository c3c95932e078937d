"""Sums over processes: of anything, and of gradients while backward runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start

from nibble.errors import PlacementError
from nibble.place import Group
from nibble.place.reduce import checksum
from nibble.spec.config import Place


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("reduce")
    for code, output in start(Path(__file__).with_name("reduce_worker.py"), folder, timeout_s=100):
        assert code == 0, output[-3000:]
    return [torch.load(folder / f"seen-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.dist
def test_everybody_has_the_sums_and_what_the_first_one_says(seen: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(seen):
        assert (found["rank"], found["world"]) == (rank, 2)
        a, b, c = found["sums"]
        assert a.tolist() == [3.0] * 3 and b.tolist() == [[2**41 + 1]]
        assert c.tolist() == [[0.0], [3.0], [6.0]]
        assert found["max"].tolist() == [1, 5]
        assert found["gather"] == [{"rank": 0}, {"rank": 1}]
        assert found["share"] == "from 0"
        assert found["turn"] is (rank == 1), "the first one comes first"


@pytest.mark.dist
@pytest.mark.parametrize("name", ["plain", "one bucket", "low", "no rare"])
def test_two_processes_step_as_one_does(name: str, seen: list[dict[str, Any]]) -> None:
    alone = seen[0][f"{name} alone"]
    for key, weight in alone["weights"].items():
        torch.testing.assert_close(seen[0][name]["weights"][key], weight, atol=1e-5, rtol=1e-5)
        assert torch.equal(seen[0][name]["weights"][key], seen[1][name]["weights"][key]), key
    for key, gradient in alone["gradients"].items():
        for found in seen:
            mine = found[name]["gradients"][key]
            assert (mine is None) == (gradient is None), key
            if gradient is not None:
                torch.testing.assert_close(mine, gradient, atol=1e-4, rtol=1e-5)
    assert alone["gradients"]["never.weight"] is None


@pytest.mark.dist
def test_projected_gradients_send_their_small_tensors_only(seen: list[dict[str, Any]]) -> None:
    """Rank 8 of a 128 x 32 matrix: a quarter of its gradient; all other tensors as they are."""
    whole, small = seen[0]["plain"]["sent"], seen[0]["low"]["sent"]
    up, others = 128 * 32 * 4, (128 + 32 * 128 + 32 + 32 * 32 + 32 + 4 * 4 + 4) * 4
    assert set(whole) == {up + others}
    # Steps that end with a new basis send its sketch as well.
    assert min(small) == up // 4 + others
    assert max(small) <= 2 * up // 4 + others


@pytest.mark.dist
def test_processes_that_train_other_things_are_told(seen: list[dict[str, Any]]) -> None:
    for found in seen:
        assert "rank 1 trains other parameters than rank 0 (a)" in found["other names"]


def test_a_checksum_sees_one_bit_and_the_order() -> None:
    a, b = torch.randn(7, 3), torch.randn(5).to(torch.bfloat16)
    before = checksum([a, b])
    assert before == checksum([a.clone(), b.clone()]) != checksum([a, b * 2])
    a.view(torch.int32)[3, 1] ^= 1
    assert checksum([a, b]) != before
    assert checksum([]) == 0


def test_an_environment_that_contradicts_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(device="cpu")
    assert Group.from_environment(place).world == 1
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(PlacementError, match="RANK and WORLD_SIZE go together"):
        Group.from_environment(place)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PlacementError, match="RANK=2 of WORLD_SIZE=2"):
        Group.from_environment(place)


def test_others_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    from processes import free_port

    port = str(free_port())
    words = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PlacementError, match=rf"rank 0 of 2 could not meet the others at .*{port}"):
        Group.from_environment(Place(device="cpu", timeout_s=1))
