"""The same equality on two GPUs: NCCL, the Triton kernels, and how this torch shards integers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_all_placements import make_base, make_data
from test_fsdp import STEPS, a_case, checked, make_tied, run, same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.dist,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def cases(root: Path) -> list[dict[str, Any]]:
    found = [
        a_case(root, "nf4", "lora"),
        a_case(root, "int8", "lora"),
        a_case(root, "hqq", "dora"),
        a_case(root, "nf4", "lora", words=["floats"], as_floats=True),
        a_case(root, "none", "none", base="tied"),
        a_case(root, "nf4", "lora", words=["grad-op"], place={"shard": "grad-op"}),
        a_case(root, "none", "none", words=["galore"], steps=4,
               optim={"method": "galore", "rank": 4, "refresh_every": 2, "learning_rate": 1e-3}),
        a_case(root, "nf4", "lora", words=["dropout"], learnt={"dropout": 0.2}, steps=4,
               restore=True, alone=False),
    ]  # fmt: skip
    for case in found:
        case["recipe"]["place"]["device"] = "cuda"
    if torch.__version__ < (2, 12):  # type: ignore[operator]
        for case in found:
            case["as_floats"] = True
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("fsdp")
    make_base(root / "base")
    make_tied(root / "tied")
    make_data(root / "train.jsonl")
    return run(root, "two", json.loads(json.dumps(cases(root))), world=2)


@pytest.mark.parametrize("name", [c["name"] for c in cases(Path(".")) if c.get("alone", True)])
def test_two_gpus_train_as_one_does(name: str, two: list[dict[str, Any]]) -> None:
    alone = next(checked(r[f"{name} alone"]) for r in two if f"{name} alone" in r)
    bound = 1e-3 if name.startswith("int8") else 2e-4
    for rank in two:
        one = checked(rank[name])
        same(one, alone, bound=bound, keys=("first", "losses", "norms", "weights"))
        for key, expected in alone["before"].items():
            assert torch.equal(two[0][name]["before"][key], expected), key
            assert torch.equal(two[0][name]["after"][key], expected), key


def test_dropout_goes_on_bit_for_bit(two: list[dict[str, Any]]) -> None:
    name = "nf4 lora base dropout"
    for rank in two:
        straight, again = checked(rank[name]), checked(rank[f"{name} on again"])
        assert len(straight["losses"]) > STEPS and straight["losses"][4] == again["losses"][4]
        for parameter, value in straight["weights"].items():
            assert torch.equal(value, again["weights"][parameter]), parameter
