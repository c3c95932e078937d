"""ZeRO on two GPUs, through NCCL: the same steps as one GPU, with the real library."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start
from test_all_placements import make_base, make_data, of_single, ran, same
from test_deepspeed import table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.dist,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason='needs pip install "nibble[deepspeed]"',
    ),
]
STEPS = 8
CHOSEN = ("lora 3", "none 1", "dora 3")


def cases(root: Path) -> list[dict[str, Any]]:
    """Rows of the table, in fp32 and (adapters on 16-bit weights) in bf16."""
    rows = [row for row in table(root) if row["name"].partition(" ")[2] in CHOSEN]
    found = []
    for row in rows:
        row["recipe"]["place"]["device"] = "cuda"
        row["steps"] = STEPS
        found.append(row)
        if row["name"].endswith("lora 3"):
            half = json.loads(json.dumps({**row, "restore": False, "name": f"{row['name']} bf16"}))
            half["single"] += " bf16"
            half["recipe"]["train"]["precision"] = "bf16"
            found.append(half)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("deepspeed")
    make_base(root / "base")
    make_data(root / "train.jsonl")
    (root / "cases.json").write_text(json.dumps(cases(root)))
    ended = start(Path(__file__).with_name("placements_worker.py"), root)
    for code, output in ended:
        assert code == 0, output[-4000:]
    return [torch.load(root / f"found-{rank}.pt", weights_only=False) for rank in range(2)]


ROWS = [row for row in cases(Path(".")) if row["kind"] == "deepspeed"]


@pytest.mark.parametrize("name", [r["name"] for r in ROWS if not r["name"].endswith("bf16")])
def test_two_gpus_train_as_one_does(name: str, two: list[dict[str, Any]]) -> None:
    single = of_single(two, name)
    for ranks in two:
        same(ranks[name], single, later=2e-4)
    assert single["losses"][max(single["losses"])] < single["losses"][1]


@pytest.mark.parametrize("name", [row["name"] for row in ROWS if row["restore"]])
def test_a_run_goes_on_with_another_number_of_gpus(name: str, two: list[dict[str, Any]]) -> None:
    single = of_single(two, name)
    for one in (ran(two, f"{name} 2 to 1"), ran(two, f"{name} 1 to 2")):
        assert min(one["losses"]) == STEPS // 2 + 1
        same(one, single, later=2e-4)


@pytest.mark.parametrize("name", [r["name"] for r in ROWS if r["name"].endswith("bf16")])
def test_half_precision_learns_the_same(name: str, two: list[dict[str, Any]]) -> None:
    single = of_single(two, name)
    for ranks in two:
        assert "error" not in ranks[name], ranks[name]["error"]
        assert ranks[name]["losses"] == pytest.approx(single["losses"], abs=2e-2)
