"""Two processes that hold parts of every parameter, or batches of their own, step as one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start
from sharded_rows import CUTS, LAYERWISE, ROWS, SHAPES
from torch import nn

from nibble.errors import ConfigError
from nibble.optim import Optimizer, layerwise_
from nibble.optim.shards import ShardView

WORLD = 2


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    worker = Path(__file__).with_name("sharded_worker.py")
    for code, output in start(worker, folder, world=WORLD, timeout_s=120):
        assert code == 0, output[-3000:]
    return [torch.load(folder / f"sharded-{rank}.pt") for rank in range(WORLD)]


@pytest.mark.dist
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ROWS)
def test_two_parts_step_as_the_whole(name: str, cut: str, seen: list[dict[str, Any]]) -> None:
    for found in (rank[f"{name}, {cut}"] for rank in seen):
        shapes = ROWS[name].get("shapes", SHAPES)
        for shape, own, expected in zip(shapes, found["own"], found["expected"], strict=True):
            codec = ROWS[name].get("codec", "fp32")
            # Blocks of 256 begin anew in each part.
            bound = 1e-5 if codec == "fp32" else 2e-2
            if codec == "bf16" or "dtype" in ROWS[name]:
                assert torch.equal(own, expected), shape
            assert (own - expected).norm() <= bound * expected.norm() + 1e-12, shape
        assert found["states_differ"] == []
        assert found["wrong_on_disk"] == []
    assert seen[0][f"{name}, {cut}"]["sizes"] == seen[1][f"{name}, {cut}"]["sizes"]


@pytest.mark.dist
def test_bases_are_made_of_small_sums(seen: list[dict[str, Any]]) -> None:
    longest = 120  # rows of the stack, as a matrix
    for name in ("galore randomised", "galore randomised, full", "fira randomised"):
        for cut in CUTS:
            sizes = seen[0][f"{name}, {cut}"]["sizes"]
            assert sizes and max(sizes) <= 8 * longest
    # Element-wise rules ask nobody; cut along the local dim, a step without refresh does not.
    assert seen[0]["adamw, rows"]["sizes"] == []
    assert seen[0]["galore random, left, last"]["sizes"].count(8 * 96) == 0


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYERWISE)
def test_layerwise_ranks_equal_one_and_each_other(name: str, seen: list[dict[str, Any]]) -> None:
    one, two = (rank[name] for rank in seen)
    for a, b in zip(one["own"], two["own"], strict=True):
        assert torch.equal(a, b)
    exact = LAYERWISE[name].get("codec", "fp32") == "fp32"
    for own, alone in zip(one["own"], one["alone"], strict=True):
        assert (own - alone).norm() <= (1e-5 if exact else 5e-3) * alone.norm()
    assert one["sent"] == two["sent"]


@pytest.mark.dist
def test_only_projected_gradients_travel(seen: list[dict[str, Any]]) -> None:
    for name, ratio in (("layerwise random", 4), ("layerwise, a sixteenth", 16)):
        # up is 96 x 64, down 64 x 96 with a bias, and rare 96 x 96.
        rank = LAYERWISE[name].get("rank", 16)
        sent = min(seen[0][name]["sent"])
        assert sent == 3 * 96 * rank + 64
        assert ratio * 2 * 96 * rank == 2 * 96 * 64


def view(*shape: int, dim: int | None = 0) -> ShardView:
    return ShardView(shape=shape, dim=dim)


def test_what_cannot_be_cut_is_refused() -> None:
    stack = nn.Parameter(torch.zeros(4, 10, 24))
    with pytest.raises(ConfigError, match="neither rows nor columns"):
        Optimizer([stack], rank=8, views={stack: view(4, 20, 24, dim=1)}).projections(0)
    with pytest.raises(ConfigError, match="of no parameter of this optimiser"):
        Optimizer([nn.Parameter(torch.zeros(3))], views={stack: view(4, 20, 24)})
    half = nn.Parameter(torch.zeros(16, 24))
    sharded = Optimizer([half], rank=8, basis="randomised", views={half: view(32, 24)})
    with pytest.raises(ConfigError, match="these are sharded"):
        layerwise_(sharded)


def test_split_dims_of_every_kind_of_state() -> None:
    tall, wide = nn.Parameter(torch.zeros(16, 24)), nn.Parameter(torch.zeros(24, 16))
    words: dict[str, Any] = {"rank": 8, "basis": "randomised", "rule": "adafactor_momentum"}
    views = {tall: view(32, 24), wide: view(24, 32, dim=1)}
    optimizer = Optimizer([tall, wide], views=views, **words)
    # R is [32, 8] cut by rows and [8, 32] cut by columns.
    dims = optimizer.split_dims(tall)
    assert dims["basis_right"] is None and dims["exp_avg"] == 0
    assert dims["exp_avg_sq_row"] == 0 and dims["exp_avg_sq_col"] is None
    assert dims["exp_avg_absmax"] == 0 and dims["exp_avg_sq_col_absmax"] is None
    dims = optimizer.split_dims(wide)
    assert dims["exp_avg"] == 1 and dims["exp_avg_codes"] == 1
    assert dims["exp_avg_sq_row"] is None and dims["exp_avg_sq_col"] == 0
    # P^T G of rows is a sum: its state is the same on all.
    left = Optimizer([tall], views={tall: view(32, 24)}, proj_type="left", **words)
    assert set(left.split_dims(tall).values()) == {None, 0} - {0}
    plain = Optimizer([tall, wide], views=views, rule="adafactor")
    assert plain.split_dims(tall)["exp_avg_sq_row"] == 0
    assert plain.split_dims(wide)["exp_avg_sq_col"] == 0
