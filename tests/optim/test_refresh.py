"""Bases made together: each has the bits that it has alone, whatever is beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nibble.numerics import cholesky, lowrank
from nibble.optim import Optimizer, refresh
from nibble.optim.projection import Projection
from nibble.optim.refresh import Due, refresh_

torch.set_num_threads(1)

SHAPES = [(96, 64), (64, 96), (80, 80), (200, 64), (96, 64)]


@pytest.fixture(autouse=True)
def small_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "LEAF", 8)


def optimizer_of(dtype: torch.dtype, **options: Any) -> Optimizer:
    """An optimiser over matrices of several shapes, with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in SHAPES:
        param = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        param.grad = torch.randn(shape, generator=generator).to(dtype)
        params.append(param)
    return Optimizer(
        params, rank=20, basis="randomised", update_proj_gap=5, seed=3, codec="fp32", **options
    )


def bases(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith("basis_")}


def refreshed(optimizer: Optimizer, chosen: list[int]) -> list[dict[str, Any]]:
    """States of the chosen parameters after a refresh of these alone, together."""
    due = []
    for weight, projection in optimizer.projections(0).items():
        if projection.position in chosen:
            state: dict[str, Any] = {"step": 1}
            projection.initialise_(state)
            assert weight.grad is not None
            due.append(Due(projection, state, weight.grad, 0))
    refresh_(due)
    return [one.state for one in due]


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_basis_does_not_hang_on_what_is_beside_it(dtype: torch.dtype, proj_type: str) -> None:
    optimizer = optimizer_of(dtype, proj_type=proj_type)
    all_of = refreshed(optimizer, list(range(len(SHAPES))))
    for chosen in ([0], [1], [4], [2, 3], [0, 2, 4]):
        for index, state in zip(chosen, refreshed(optimizer, chosen), strict=True):
            assert state["num_refreshes"] == 1
            assert bases(state) and bases(state).keys() == bases(all_of[index]).keys()
            for name, basis in bases(state).items():
                assert torch.equal(basis, all_of[index][name])
                error = (basis.mT @ basis - torch.eye(20)).abs().max()
                assert error < 1e-5


@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_a_basis_is_what_the_projection_makes_by_itself(proj_type: str) -> None:
    optimizer = optimizer_of(torch.bfloat16, proj_type=proj_type)
    made = refreshed(optimizer, list(range(len(SHAPES))))
    pairs = zip(optimizer.projections(0).items(), made, strict=True)
    for (weight, projection), state in pairs:
        assert weight.grad is not None
        alone = projection.new_bases({"num_refreshes": 0}, weight.grad)
        for side, basis in alone.items():
            assert torch.equal(state[f"basis_{side}"], basis)


def test_chunks_hold_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    together = lowrank.together

    def counted(makings: list[lowrank.Making]) -> Any:
        sizes.append(len(makings))
        return together(makings)

    monkeypatch.setattr(lowrank, "together", counted)
    one = [2 * 64 * 20 * 4, 2 * 64 * 20 * 4, 2 * 80 * 20 * 4, 200 * 20 * 4, 2 * 64 * 20 * 4]
    one = [nbytes + 20 * 20 * 20 for nbytes in one]
    for limit, expected in ((1, [1] * 5), (sum(one[:2]), [2, 1, 1, 1]), (sum(one), [5])):
        if limit == sum(one[:2]):
            expected = [2, *_cut(one[2:], limit)]
        monkeypatch.setattr(refresh, "REFRESH_NBYTES", limit)
        sizes.clear()
        refreshed(optimizer_of(torch.float32), list(range(5)))
        assert sizes == expected
    # Both sides of a matrix stay together.
    monkeypatch.setattr(refresh, "REFRESH_NBYTES", 1)
    sizes.clear()
    refreshed(optimizer_of(torch.float32, proj_type="full"), list(range(5)))
    assert sizes == [2] * 5


def _cut(nbytes: list[int], limit: int) -> list[int]:
    sizes, held = [0], 0
    for own in nbytes:
        if sizes[-1] and held + own > limit:
            sizes.append(0)
            held = 0
        sizes[-1] += 1
        held += own
    return sizes


def test_steps_make_bases_together_once_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    together = refresh._refresh_chunk_

    def counted(chunk: Any) -> None:
        seen.append([due.projection.position for due, _ in chunk])
        together(chunk)

    monkeypatch.setattr(refresh, "_refresh_chunk_", counted)
    optimizer = optimizer_of(torch.float32, stagger=False)
    weights: list[Projection] = list(optimizer.projections(0).values())
    for _ in range(6):
        optimizer.step()
    assert [sorted(positions) for positions in seen] == [list(range(len(weights)))] * 2
    seen.clear()
    staggered = optimizer_of(torch.float32, stagger=True)
    for _ in range(11):
        staggered.step()
    # All at once at first, for want of any; from then on one by one.
    assert sorted(seen[0]) == list(range(len(weights)))
    assert all(len(positions) == 1 for positions in seen[1:])
    assert {positions[0] for positions in seen[1:]} == set(range(len(weights)))
