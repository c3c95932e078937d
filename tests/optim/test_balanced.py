"""The balanced rest of a gradient, against dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from test_residuals import matrices
from torch import Tensor, nn

from nibble.errors import ConfigError
from nibble.numerics import lowrank
from nibble.numerics.balancing import NUM_ROUNDS
from nibble.optim import Optimizer, balanced, batches
from nibble.optim.residuals import Matrix, residuals


def dense(one: Matrix, *, scale: float) -> Tensor:
    """back(U) and the rest over the scale, with nothing left out."""
    left, right = one.projection.own_bases(one.state, dtype=torch.float64)
    grad, small, update = one.grad.double(), one.small_grad.double(), one.update.double()
    rest = grad - lowrank.project_back(small, left=left, right=right)
    for _ in range(NUM_ROUNDS):
        rest = rest / rest.square().mean(1, keepdim=True).sqrt()
        rest = rest / rest.square().mean(0, keepdim=True).sqrt()
    rest = rest * balanced.SIZE * update.square().mean().sqrt() / scale
    return lowrank.project_back(update, left=left, right=right) + rest


def made(one: Matrix) -> Tensor:
    """What `residuals` says is to be added, as a whole."""
    ((_, found),) = residuals([one])
    assert found.rest is not None and found.small is not None and found.factor is None
    left, right = one.projection.own_bases(one.state, dtype=one.grad.dtype)
    back = lowrank.project_back(found.small, left=left, right=right)
    return found.rest.scaled_(slice(0, one.grad.shape[0])) + back


def rest_of(one: Matrix) -> Tensor:
    """What it adds of the part outside of the basis."""
    ((_, found),) = residuals([one])
    assert found.rest is not None
    return found.rest.scaled_(slice(0, one.grad.shape[0])).float()


@pytest.mark.parametrize("few_bytes", [None, 700])
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_it_is_what_dense_matrices_say(
    scale: float, few_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = matrices("balanced", scale)
    if few_bytes is not None:  # a matrix at a time, and a row of it
        monkeypatch.setattr(batches, "BATCH_NBYTES", few_bytes)
    for one in many:
        expected = dense(one, scale=scale)
        assert (made(one) - expected).norm() <= 1e-4 * expected.norm()
    seen = set()
    for index, found in residuals(many):
        ((_, alone),) = residuals([many[index]])
        assert found.rest is not None and alone.rest is not None
        for ours, own in zip(found.rest, alone.rest, strict=True):
            assert torch.allclose(ours, own, rtol=1e-5, atol=1e-6)
        seen.add(index)
    assert seen == set(range(len(many)))


def test_sixteen_bits_cost_their_rounding() -> None:
    for one in matrices("balanced", 0.25, dtype=torch.bfloat16):
        expected = dense(one, scale=0.25)
        found = made(one)
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_rows_and_columns_of_the_rest_have_one_size() -> None:
    for one in matrices("balanced", 1.0):
        rest = rest_of(one)
        size = balanced.SIZE * one.update.square().mean().sqrt()
        for dim in (0, 1):
            each = rest.square().mean(dim).sqrt() / size
            assert each.sub(1).abs().max() < 0.05


def test_what_lies_within_the_basis_leaves_no_noise() -> None:
    """Rounding is not blown up to the size of an update."""
    for dtype in (torch.float32, torch.bfloat16):
        (one, *_) = matrices("balanced", 1.0)
        left, right = one.projection.own_bases(one.state, dtype=torch.float32)
        inside = lowrank.project_back(one.small_grad, left=left, right=right).to(dtype)
        bases = one.projection.own_bases(one.state, dtype=dtype)
        small = lowrank.project(inside, left=bases[0], right=bases[1]).float()
        rest = rest_of(one._replace(grad=inside, small_grad=small))
        bound = 1e-6 if dtype == torch.float32 else 0.5
        assert rest.square().mean() <= bound * one.update.square().mean()


def test_zeros_stay_zeros() -> None:
    (one, *_) = matrices("balanced", 0.25)
    grad = one.grad.clone()
    grad[3] = 0
    grad[:, 5] = 0
    left, right = one.projection.own_bases(one.state, dtype=torch.float32)
    small = lowrank.project(grad, left=left, right=right)
    nothing = torch.zeros_like(grad)
    for given, given_small in ((grad, small), (nothing, torch.zeros_like(small))):
        rest = rest_of(one._replace(grad=given, small_grad=given_small))
        assert bool(torch.isfinite(rest).all())
        if given is nothing:
            assert not rest.any()


def test_it_has_no_state_and_no_limit() -> None:
    weight = nn.Parameter(torch.zeros(24, 40))
    weight.grad = torch.randn(24, 40)
    words = {"rank": 6, "basis": "randomised"}
    optimizer = Optimizer([weight], residual="balanced", **words)
    optimizer.step()
    plain = Optimizer([weight], **words)
    plain.step()
    assert optimizer.state[weight].keys() == plain.state[weight].keys()
    with pytest.raises(ConfigError, match=r"norm_growth=1\.05 has no effect: residual 'balanced'"):
        Optimizer([{"params": [weight], "norm_growth": 1.05, "residual": "balanced", **words}])


def test_temporaries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer has as many matrices as fit, at least one, and is used again."""
    alike = [one for one in matrices("balanced", 0.25) if one.grad.shape == (40, 24)]
    assert len(alike) == 3
    for held, expected in ((1, 1), (2 * 4 * 40 * 24, 2), (1 << 20, 3)):
        monkeypatch.setattr(batches, "BATCH_NBYTES", held)
        buffers = set()
        for _, found in residuals(alike):
            assert found.rest is not None
            storage = found.rest.outside.untyped_storage()
            buffers.add((storage.data_ptr(), storage.nbytes()))
        assert [size for _, size in buffers] == [expected * 4 * 40 * 24]
