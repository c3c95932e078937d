"""Update rules against torch.optim, transformers and closed forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nibble.numerics.updates import RULES, Hyper, adafactor_, adamw_, lion_
from nibble.spec import state as state_spec

SHAPES = ((8, 5), (8, 5), (7,), (3, 4, 6), ())


def run(
    rule: str,
    *,
    lr: float,
    steps: int,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    **hyper: object,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Weights after `steps` of the bare rule, and the gradients it saw."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    states = {
        slot.name: [torch.zeros(slot.shape(shape)) for shape in shapes]
        for slot in state_spec.slots(rule, num_dims=len(shapes[0]))
    }
    seen = []
    for step in range(1, steps + 1):
        grads = [torch.randn(shape, generator=generator) + 0.2 for shape in shapes]
        seen.append([grad.clone() for grad in grads])
        updates = RULES[rule].apply_(grads, states=states, hyper=Hyper(step=step, **hyper))
        for grad, kept in zip(grads, seen[-1], strict=True):
            assert torch.equal(grad, kept), "a rule only reads gradients"
        for weight, update in zip(weights, updates, strict=True):
            weight.sub_(update, alpha=lr)
    return weights, seen


def reference(
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    seen: list[list[Tensor]],
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    optimizer = make(weights)
    for grads in seen:
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone()
        optimizer.step()
    return [weight.detach() for weight in weights]


def assert_close(ours: list[Tensor], theirs: list[Tensor], bound: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.linalg.vector_norm(one - other) <= bound * torch.linalg.vector_norm(other)


def test_tables_of_rules_agree() -> None:
    assert set(RULES) == set(state_spec.RULES)


def test_adamw_equals_torch() -> None:
    ours, seen = run("adamw", lr=1e-2, steps=20, betas=(0.9, 0.95), eps=1e-6)
    theirs = reference(
        lambda weights: torch.optim.AdamW(
            weights, lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0
        ),
        seen,
    )
    assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize(("rule", "momentum"), [("sgd", 0.0), ("momentum", 0.8)])
def test_sgd_equals_torch(rule: str, momentum: float) -> None:
    ours, seen = run(rule, lr=1e-2, steps=20, momentum=momentum)
    theirs = reference(lambda weights: torch.optim.SGD(weights, lr=1e-2, momentum=momentum), seen)
    assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize("shapes", [((8, 5), (8, 5), (3, 4, 6), (5, 8)), ((7,), (), (7,))])
def test_adafactor_equals_transformers(shapes: tuple[tuple[int, ...], ...]) -> None:
    from transformers.optimization import Adafactor

    eps = 1e-8
    ours, seen = run("adafactor", lr=1e-2, steps=20, shapes=shapes, eps=eps)
    theirs = reference(
        lambda weights: Adafactor(
            weights, lr=1e-2, eps=(eps**2, 1e-3), relative_step=False, scale_parameter=False
        ),
        seen,
        shapes,
    )
    assert_close(ours, theirs, 2e-6)


def test_adafactor_first_step_in_closed_form() -> None:
    # A rank-one gradient a b^T is factored without error: at t = 1 the update is its sign.
    grad = torch.outer(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 4.0]))
    states = {"exp_avg_sq_row": [torch.zeros(3)], "exp_avg_sq_col": [torch.zeros(2)]}
    (update,) = adafactor_([grad], states=states, hyper=Hyper(step=1, eps=1e-12))
    assert torch.allclose(update, grad.sign(), atol=1e-6)
    assert torch.allclose(states["exp_avg_sq_row"][0], grad.square().mean(1))
    # A later gradient ten times larger is clipped to an RMS of 1.
    (update,) = adafactor_([10 * grad], states=states, hyper=Hyper(step=1000, eps=1e-12))
    assert update.square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-5)


def test_lion_in_closed_form() -> None:
    grads = [torch.tensor([1.0, -1.0, 0.5])]
    states = {"exp_avg": [torch.tensor([-20.0, -1.0, 0.0])]}
    (update,) = lion_(grads, states=states, hyper=Hyper(step=1, betas=(0.9, 0.99)))
    assert update.tolist() == [-1.0, -1.0, 1.0]  # sign(0.9 m + 0.1 g)
    expected = torch.tensor([-20 * 0.99 + 0.01, -1.0, 0.005])
    assert torch.allclose(states["exp_avg"][0], expected)


def test_adamw_on_a_quadratic() -> None:
    # Minimum of (x - 3)^2 + 10 (y + 1)^2; and the first step is lr * sign(g), whatever its scale.
    target, curvature = torch.tensor([3.0, -1.0]), torch.tensor([2.0, 20.0])
    point = torch.zeros(2)
    states = {"exp_avg": [torch.zeros(2)], "exp_avg_sq": [torch.zeros(2)]}
    for step in range(1, 401):
        grad = curvature * (point - target)
        (update,) = adamw_([grad], states=states, hyper=Hyper(step=step))
        if step == 1:
            assert torch.allclose(update, grad.sign(), atol=1e-6)
        point -= 0.1 * (1 - step / 401) * update
    assert torch.allclose(point, target, atol=1e-3)
