"""How many processes a machine runs, and which GPUs CUDA would show them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from nibble.errors import PlacementError
from nibble.launch.devices import Card, check_launched, choose, num_processes, unequal
from nibble.launch.environment import Launch
from nibble.spec.config import Place
from nibble.spec.units import GIB

BIG = [Card(name="RTX 4090", uuid=f"GPU-{i}a-b", total_bytes=24 * GIB - i) for i in range(4)]
SMALL = Card(name="RTX 3060", uuid="GPU-9-c", total_bytes=12 * GIB)


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, [0, 1, 2, 3]),
        ("2,0", [2, 0]),
        ("", []),
        ("-1", []),
        ("0,1,7,2", [0, 1]),  # what names nothing ends the list
        ("1,1", []),
        ("GPU-2a,GPU-0a-b", [2, 0]),
        ("GPU-", []),  # ambiguous
        ("0, 3", [0, 3]),
    ],
)
def test_visible_devices_are_read_as_cuda_does(visible: str | None, found: list[int]) -> None:
    assert choose(BIG, visible) == [BIG[i] for i in found]


def test_a_part_of_a_card_is_one_device() -> None:
    assert len(choose(BIG, "MIG-1,MIG-2")) == 1


@pytest.mark.parametrize(
    ("words", "num_cards", "count"),
    [
        ({}, 4, 4),
        ({}, 1, 1),
        ({}, 0, 1),
        ({"num_devices": 2}, 4, 2),
        ({"num_devices": 2}, 0, 2),
        ({"device": "cpu"}, 4, 1),
        ({"device": "cpu", "num_devices": 3}, 4, 3),
        ({"device": "cuda:1"}, 4, 1),
        ({"kind": "single"}, 4, 1),
        ({"kind": "dp", "num_devices": 2}, 4, 1),
        ({"kind": "fsdp"}, 2, 2),
        ({"device": "cuda"}, 0, 1),
    ],
)
def test_a_process_for_each_device(words: dict[str, Any], num_cards: int, count: int) -> None:
    assert num_processes(Place(**words), BIG[:num_cards]) == count


def test_fewer_gpus_than_asked_are_told_with_both_numbers() -> None:
    with pytest.raises(PlacementError, match=r"num_devices=8, but this machine shows 2 GPUs"):
        num_processes(Place(num_devices=8), BIG[:2])
    with pytest.raises(PlacementError, match=r"num_devices=2 with .*, but no GPU"):
        num_processes(Place(num_devices=2, device="cuda"), [])


def test_unequal_cards_are_named() -> None:
    assert unequal(BIG) is None
    assert unequal([SMALL]) is None
    said = unequal([BIG[0], SMALL, BIG[1]])
    assert said is not None
    assert said.startswith("RTX 3060 (12.00 GiB) limits all 3 GPUs")
    assert "RTX 4090 (24.00 GiB)" in said


def launch(**words: Any) -> Launch:
    base: dict[str, Any] = {
        "launcher": "torchrun", "rank": 0, "world": 2, "local_rank": 0, "local_world": 2,
        "master": "127.0.0.1", "port": 1, "nodes": 1,
    }  # fmt: skip
    return Launch(**{**base, **words})


def test_a_launcher_must_start_what_the_recipe_asks_for() -> None:
    check_launched(Place(kind="ddp"), launch())
    check_launched(Place(kind="single"), launch(world=1, local_world=1))
    check_launched(Place(num_devices=4), launch(starts="machines", local_world=1))
    with pytest.raises(PlacementError, match="single is one process, but torchrun started 2"):
        check_launched(Place(kind="single"), launch())
    with pytest.raises(PlacementError, match="num_devices=4, but torchrun started 2"):
        check_launched(Place(num_devices=4), launch())


def test_deciding_imports_no_torch() -> None:
    code = (
        "import os, sys; import nibble.cli.app, nibble.cli.launching as l; "
        "from nibble.launch.devices import visible_cards; visible_cards(os.environ); "
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
