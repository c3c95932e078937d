"""Residuals of many matrices at once, against whole matrices one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nibble.numerics import lowrank
from nibble.optim import Optimizer
from nibble.optim.residuals import Matrix, residuals
from nibble.spec.lowrank import METHODS

SHAPES = ((40, 24), (24, 40), (40, 24), (24, 24), (24, 40), (40, 24))
"""Stacks of three, two and one, on both sides."""
RANK = 6


def matrices(residual: str, scale: float, *, dtype: torch.dtype = torch.float32) -> list[Matrix]:
    """Pieces with a basis, a gradient, an update that is not the gradient, and a last norm."""
    generator = torch.Generator().manual_seed(0)
    found = []
    basis = "seeded" if residual in ("channel", "tensor") else "svd"
    for number, shape in enumerate(SHAPES):
        weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
        weight.grad = torch.randn(shape, generator=generator).to(dtype)
        optimizer = Optimizer([weight], rank=RANK, basis=basis, residual=residual, scale=scale)
        optimizer.step()
        projection = optimizer.projections(0)[weight]
        grad = weight.grad * (1.0 + number)
        left, right = projection.own_bases(optimizer.state[weight], dtype=dtype)
        small = lowrank.project(grad, left=left, right=right).float()
        update = torch.randn(small.shape, generator=generator) + small.sign()
        state = {**optimizer.state[weight], "residual_norm": torch.tensor(1.5 * number)}
        found.append(Matrix(projection, state, grad, small, update))
    return found


def dense(one: Matrix, *, residual: str, scale: float) -> tuple[Tensor, Tensor]:
    """(update over scale, norm kept) of one matrix, in float64 with nothing left out."""
    left, right = one.projection.own_bases(one.state, dtype=torch.float64)
    grad, small, update = one.grad.double(), one.small_grad.double(), one.update.double()
    dim = 0 if left is not None else 1
    ratio = update.norm(dim=dim, keepdim=True) / small.norm(dim=dim, keepdim=True)
    if residual == "tensor":
        ratio = update.norm() / small.norm()
    back = lowrank.project_back
    rest = ratio * grad
    if residual == "fira":
        rest = ratio * (grad - scale * back(small, left=left, right=right))
    limit, last = 1.0, float(one.state["residual_norm"])
    if last > 0:
        limit = min(1.0, 1.01 * last / float(rest.norm()))
    whole = limit * rest if residual != "fira" else limit * rest / scale
    if residual == "fira":
        whole = whole + back(update, left=left, right=right)
    return whole, limit * rest.norm()


@pytest.mark.parametrize(
    ("residual", "scale"), [("fira", 0.25), ("fira", 1.0), ("channel", 1.0), ("tensor", 11.3)]
)
def test_many_at_once_are_each_its_own(residual: str, scale: float) -> None:
    many = matrices(residual, scale)
    expected = [dense(one, residual=residual, scale=scale) for one in many]
    found = dict(residuals(many))
    for index, (one, (whole, norm)) in enumerate(zip(many, expected, strict=True)):
        rest = found.pop(index)
        made = rest.factor * one.grad
        if residual == "fira":
            assert rest.small is not None
            left, right = one.projection.own_bases(one.state, dtype=torch.float32)
            made = made + lowrank.project_back(rest.small, left=left, right=right)
        else:
            assert rest.small is None
        assert torch.allclose(made.double(), whole, rtol=1e-4, atol=1e-5 * float(whole.norm()))
        assert float(one.state["residual_norm"]) == pytest.approx(float(norm), rel=1e-4)
    assert not found


def test_what_is_projected_back_has_the_gradients_type() -> None:
    for _, rest in residuals(matrices("fira", 0.25, dtype=torch.bfloat16)):
        assert rest.small is not None and rest.small.dtype == torch.bfloat16
        assert rest.factor.dtype == torch.float32


def test_a_matrix_within_its_basis_has_nothing_to_limit() -> None:
    """The norm is a difference of squares; rounding must not make it the root of less than 0."""
    (one, *_) = matrices("fira", 1.0)
    left, right = one.projection.own_bases(one.state, dtype=torch.float32)
    inside = lowrank.project_back(one.small_grad, left=left, right=right)
    ((_, rest),) = residuals([one._replace(grad=inside)])
    assert rest.small is not None and bool(torch.isfinite(rest.small).all())
    kept: Any = one.state["residual_norm"]
    assert 0 <= float(kept) < 1e-2 * float(inside.norm())


def test_every_method_with_a_residual_is_tried_here() -> None:
    rows = {row["residual"] for row in METHODS.values() if "residual" in row}
    assert rows == {"fira", "channel", "tensor", "balanced"}
