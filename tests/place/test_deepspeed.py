"""ZeRO by the library itself: the same steps as one device, with less on each process.

Two processes train every row of the table with the real library, where it is installed; one of them
trains the row alone, too.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start
from test_all_placements import STEPS, a_recipe, make_base, make_data, of_single, same

STAGES = (2, 3)
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason='needs pip install "nibble[deepspeed]"'
)


def table(root: Path) -> list[dict[str, Any]]:
    """The rows: stage x what is trained x accumulation."""
    rows = []
    for adapter in ("none", "lora", "dora"):
        for accumulation in (1, 3):
            if (adapter, accumulation) == ("dora", 1):
                continue
            long = (adapter, accumulation) in (("lora", 3), ("none", 1))
            for stage in (None, *STAGES):
                kind = "single" if stage is None else "deepspeed"
                rows.append(
                    {
                        "name": f"{stage or 'single'} {adapter} {accumulation}",
                        "kind": kind,
                        "accumulation": accumulation,
                        "steps": STEPS if long else 4,
                        "restore": long,
                        "recipe": a_recipe(root, "none", adapter),
                        "place": {} if stage is None else {"zero_stage": stage},
                    }
                )
    return rows


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw, by row."""
    root = tmp_path_factory.mktemp("deepspeed")
    make_base(root / "base")
    make_data(root / "train.jsonl")
    (root / "cases.json").write_text(json.dumps(table(root)))
    ended = start(Path(__file__).with_name("placements_worker.py"), root)
    for code, output in ended:
        assert code == 0, output[-4000:]
    return [torch.load(root / f"found-{rank}.pt", weights_only=False) for rank in range(2)]


NAMES = [row["name"] for row in table(Path(".")) if row["kind"] == "deepspeed"]
RESTORED = [r["name"] for r in table(Path(".")) if r["kind"] == "deepspeed" and r["restore"]]


@needs_library
@pytest.mark.dist
@pytest.mark.parametrize("name", NAMES)
def test_zero_trains_as_one_device_does(name: str, found: list[dict[str, Any]]) -> None:
    single = of_single(found, name)
    for ranks in found:
        same(ranks[name], single)
    assert single["losses"][max(single["losses"])] < single["losses"][1]


@needs_library
@pytest.mark.dist
@pytest.mark.parametrize("name", RESTORED)
def test_a_run_goes_on_with_another_number_of_processes(
    name: str, found: list[dict[str, Any]]
) -> None:
    single = of_single(found, name)
    fewer, more = found[0][f"{name} 2 to 1"], found[0][f"{name} 1 to 2"]
    assert min(fewer["losses"]) == min(more["losses"]) == STEPS // 2 + 1
    same(fewer, single)
    same(more, single)
