"""Schedules against transformers, and their edges."""

from __future__ import annotations

import pytest
import torch
import transformers

from nibble.errors import CheckpointError, ConfigError
from nibble.optim.schedules import SHAPES, Schedule, factor, num_warmup_steps


def a_weight() -> list[torch.Tensor]:
    return [torch.zeros(1, requires_grad=True)]


THEIRS = {
    "constant": lambda o, w, t: transformers.get_constant_schedule_with_warmup(o, w),
    "linear": transformers.get_linear_schedule_with_warmup,
    "cosine": transformers.get_cosine_schedule_with_warmup,
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 19])
def test_equals_transformers(name: str, warmup_steps: int) -> None:
    assert set(THEIRS) == set(SHAPES)
    total = 20
    theirs_optimizer = torch.optim.SGD(a_weight(), lr=0.3)
    theirs = THEIRS[name](theirs_optimizer, warmup_steps, total)
    ours_optimizer = torch.optim.SGD(a_weight(), lr=0.3)
    ours = Schedule(ours_optimizer, name=name, total_steps=total, warmup_steps=warmup_steps)
    for _ in range(total + 1):
        assert ours.get_last_lr() == pytest.approx(theirs.get_last_lr(), abs=1e-15)
        theirs.step()
        ours.step()


def test_floor_equals_transformers_and_holds_after_the_end() -> None:
    optimizer = torch.optim.SGD(a_weight(), lr=1.0)
    theirs = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, 4, 20, min_lr_rate=0.1
    )
    for step in range(21):
        ours = factor(step, total_steps=20, warmup_steps=4, floor_ratio=0.1, name="cosine")
        assert ours == pytest.approx(theirs.lr_lambdas[0](step))
    assert factor(99, total_steps=20, warmup_steps=4, floor_ratio=0.1, name="cosine") == 0.1
    assert factor(99, total_steps=20, warmup_steps=4, floor_ratio=0.1, name="linear") == 0.1


def test_state_is_one_number_and_resumes_with_the_optimizer() -> None:
    def make() -> tuple[torch.optim.Optimizer, Schedule]:
        weight, other = a_weight(), a_weight()
        optimizer = torch.optim.SGD([{"params": weight}, {"params": other, "lr": 0.02}], lr=0.5)
        return optimizer, Schedule(optimizer, name="linear", total_steps=10, warmup_steps=2)

    optimizer, schedule = make()
    for _ in range(5):
        schedule.step()
    assert schedule.state_dict() == {"num_updates": 5}
    fresh_optimizer, fresh = make()
    fresh_optimizer.load_state_dict(optimizer.state_dict())
    fresh.load_state_dict(schedule.state_dict())
    assert fresh.get_last_lr() == schedule.get_last_lr()
    assert fresh.get_last_lr() == pytest.approx([0.5 * 5 / 8, 0.02 * 5 / 8])
    with pytest.raises(CheckpointError, match="num_updates"):
        fresh.load_state_dict({"last_epoch": 3})


def test_warm_up_of_a_run() -> None:
    assert num_warmup_steps(total_steps=50, warmup_steps=None, warmup_ratio=0.03) == 2
    assert num_warmup_steps(total_steps=50, warmup_steps=4, warmup_ratio=None) == 4
    assert num_warmup_steps(total_steps=50, warmup_steps=None, warmup_ratio=None) == 0
    with pytest.raises(ConfigError, match="keep one"):
        num_warmup_steps(total_steps=50, warmup_steps=4, warmup_ratio=0.1)
    optimizer = torch.optim.SGD(a_weight(), lr=1.0)
    with pytest.raises(ConfigError, match="longer than the run"):
        Schedule(optimizer, name="cosine", total_steps=5, warmup_steps=6)
    with pytest.raises(ConfigError, match="constant, linear, cosine"):
        Schedule(optimizer, name="polynomial", total_steps=5)


def test_restarts_warm_up_again_below_the_schedule() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    plain = [factor(s, total_steps=40, warmup_steps=4, floor_ratio=0.1, name="cosine")
             for s in range(40)]  # fmt: skip
    schedule = Schedule(optimizer, name="cosine", total_steps=40, warmup_steps=4, floor_ratio=0.1,
                        restart_every=10, restart_warmup_steps=4)  # fmt: skip
    seen = []
    for _ in range(40):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    for step, (rate, whole) in enumerate(zip(seen, plain, strict=True)):
        share = 1.0 if step < 10 else min(1.0, (step % 10) / 4)
        assert rate == pytest.approx(whole * share)
