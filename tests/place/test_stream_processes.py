"""Two processes stream from one copy in host memory, and train as one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start
from stream_worker import CASES
from test_streamed import CPU, filled, run, same

from nibble.place import placement
from nibble.place.group import Group
from nibble.spec.config import Place


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    folder = tmp_path_factory.mktemp("stream")
    for code, output in start(Path(__file__).with_name("stream_worker.py"), folder):
        assert code == 0, output[-4000:]
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.dist
@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_processes_train_as_one_does(number: int, found: list[list[Any]]) -> None:
    single = placement(Place(kind="single", device="cpu"), Group.alone(CPU))
    # Both see the same rows and halve the loss: sums of halves are exact.
    expected = run(single, filled(single, **CASES[number]), accumulation=3)
    ranks = [rank[number] for rank in found]
    for rank in ranks:
        same(rank["seen"], expected)
    assert ranks[0]["inode"] == ranks[1]["inode"]
    assert [rank["packed"] for rank in ranks] == [[0, 2, 4], [1, 3, 5]]
    # Two steps: only gradients of what is trained crossed.
    assert all(rank["sent"] == 2 * rank["trained"] for rank in ranks)


@pytest.mark.dist
def test_too_small_a_budget_ends_all_with_the_number(found: list[list[Any]]) -> None:
    assert "place.ram is 1.00 GiB" in found[0][-1]
    assert "place.ram is 1.00 GiB" in found[1][-1]
