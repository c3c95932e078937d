"""8-bit AdamW beside bitsandbytes' AdamW8bit."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from torch import nn

from nibble.optim import Optimizer
from nibble.spec.state import BLOCK

torch.set_num_threads(1)
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def pair(shape: tuple[int, ...]) -> tuple[nn.Parameter, nn.Parameter]:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(start.clone()), nn.Parameter(start.clone())


@pytest.mark.parametrize("shape", [(64, 80), (4099,), (16, 16)])
def test_one_step(shape: tuple[int, ...]) -> None:
    ours, theirs = pair(shape)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours.grad, theirs.grad = grad.clone(), grad.clone()
    mine = Optimizer([ours], codec="8bit", **OPTIONS)
    other = bitsandbytes.optim.AdamW8bit([theirs], **OPTIONS)
    mine.step()
    other.step()
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    state, theirs_state = mine.state[ours], other.state[theirs]
    if ours.numel() < 4096:
        assert torch.allclose(state["exp_avg"], theirs_state["state1"])
        assert torch.allclose(state["exp_avg_sq"], theirs_state["state2"])
        return
    for name, number in (("exp_avg", 1), ("exp_avg_sq", 2)):
        absmax = theirs_state[f"absmax{number}"]
        assert torch.allclose(state[f"{name}_absmax"], absmax, rtol=1e-6)
        # Its CPU encoder looks values up in a table of 2^16 steps, so some codes near an edge
        # are one off; what the codes stand for differs by no more than that table's step.
        codes, their_codes = state[f"{name}_codes"], theirs_state[f"state{number}"]
        values = theirs_state[f"qmap{number}"]
        same = codes == their_codes
        assert same.float().mean() > (0.998 if number == 1 else 0.96)
        exact = (0.1 * grad if number == 1 else 0.01 * grad**2).flatten()
        exact = exact / absmax.repeat_interleave(BLOCK)[: exact.numel()]
        our_error = (values[codes.flatten().int()] - exact).abs()
        their_error = (values[their_codes.flatten().int()] - exact).abs()
        assert (our_error <= their_error + 1e-6).all()


def test_loss_curve() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(256, 64, generator=generator)
    targets = torch.tanh(inputs @ torch.randn(64, 64, generator=generator) / 8)

    def curve(kind: str) -> torch.Tensor:
        (weight, _), (second, _) = pair((64, 128)), pair((128, 64))
        weights = [weight, second]
        for each in weights:
            each.data.div_(8)
        options = {**OPTIONS, "lr": 3e-3, "weight_decay": 0.0}
        optimizer: torch.optim.Optimizer
        if kind == "bitsandbytes":
            optimizer = bitsandbytes.optim.AdamW8bit(weights, **options)
        else:
            optimizer = Optimizer(weights, codec=kind, **options)
        losses = []
        for _ in range(80):
            loss = (torch.relu(inputs @ weight) @ second - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    exact, ours, theirs = curve("fp32"), curve("8bit"), curve("bitsandbytes")
    assert exact[-1] < 0.1 * exact[0]
    assert ((ours - exact).abs() <= 0.05 * exact + 1e-4).all()
    assert ((ours - theirs).abs() <= 0.08 * exact + 1e-4).all()
    assert (ours - exact).abs().mean() <= 1.1 * (theirs - exact).abs().mean()


def test_a_parameter_that_rests_does_not_jump() -> None:
    # One loud element in a block, the others fall silent: a second moment rounded to 0 beside a
    # first moment that is not would divide by eps. It must behave as in fp32: fade out.
    def moved(codec: str) -> float:
        weight = nn.Parameter(torch.zeros(64, 64))
        optimizer = Optimizer([weight], lr=1e-3, codec=codec, betas=(0.9, 0.99))
        for step in range(10):
            grad = torch.zeros(64, 64)
            grad[:, ::2] = 1e-4 if step < 3 else 0.0
            grad[:, 0] = 1.0
            weight.grad = grad
            optimizer.step()
        return weight.detach()[:, 2::2].abs().max().item()

    assert moved("fp32") > 1e-3
    assert moved("8bit") <= 2 * moved("fp32")
