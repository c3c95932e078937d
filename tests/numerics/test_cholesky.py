"""Inverse Cholesky factors by halves against those of a library in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nibble.numerics import cholesky
from nibble.numerics.cholesky import inverse_factors_

torch.set_num_threads(1)


def gram_of(size: int, *, rank: int, seed: int = 0) -> Tensor:
    """Gram matrix of columns of norm 1 that have `rank` directions and noise of a thousandth."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(2 * size, rank, generator=generator)
    columns = columns @ torch.randn(rank, size, generator=generator)
    columns /= columns.norm(dim=0)
    columns += torch.randn(columns.shape, generator=generator) * 1e-3 / (2 * size) ** 0.5
    return columns.mT @ columns


def expected(gram: Tensor) -> Tensor:
    lower = torch.linalg.cholesky(gram.double())
    one = torch.eye(gram.shape[-1], dtype=torch.float64)
    return torch.linalg.solve_triangular(lower, one, upper=False)


@pytest.mark.parametrize("leaf", [1, 8, 32, 128])
@pytest.mark.parametrize("size", [1, 2, 31, 64, 65, 100])
def test_a_factor_by_halves_is_that_of_a_library(
    size: int, leaf: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cholesky, "LEAF", leaf)
    grams = torch.stack([gram_of(size, rank=2 * size, seed=seed) for seed in range(3)])
    # Scales a billion apart are no harder.
    grams[1] *= 1e-9
    factors = inverse_factors_(grams.clone())
    assert torch.equal(factors, factors.tril())
    for gram, factor in zip(grams, factors, strict=True):
        exact = expected(gram).float()
        assert (factor - exact).norm() < 3e-6 * exact.norm()


@pytest.mark.parametrize("rank", [1, 7, 300])
def test_a_shift_conditions_what_is_dependent_as_well_as_a_solve(rank: int) -> None:
    gram = gram_of(300, rank=rank)
    shift = 1e-6
    shifted = gram.double()
    shifted.diagonal().add_(shift * torch.linalg.norm(gram).double())
    factor = inverse_factors_(gram.clone().unsqueeze(0), shift=shift)[0].double()
    left_over = factor @ shifted @ factor.mT - torch.eye(300)
    lower = torch.linalg.cholesky(shifted.float())
    half = torch.linalg.solve_triangular(lower, shifted.float(), upper=False)
    solved = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    # Two solves in float32 leave as much, and both less than the next pass has to repair.
    assert left_over.abs().max() < 3 * (solved.double() - torch.eye(300)).abs().max() + 1e-5
    assert left_over.abs().max() < 0.05


def test_what_has_no_factor_stays_and_spoils_no_neighbour() -> None:
    good = gram_of(300, rank=600)
    bad = good.clone()
    bad[299, 299] = bad[299, 290:] @ bad[299, 290:] * 0.1
    bad[299, 290], bad[290, 299] = 3.0, 3.0
    broken = torch.full_like(good, float("nan"))
    factors = inverse_factors_(torch.stack((bad, good, broken, good)))
    assert torch.equal(factors[0], torch.eye(300))
    assert torch.equal(factors[1], factors[3])
    assert torch.equal(factors[1], inverse_factors_(good.unsqueeze(0))[0])
