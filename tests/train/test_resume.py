"""A run that was stopped and continued cannot be told from one that was not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from loop_fakes import make_state, next_token, run
from torch import Tensor, nn

from nibble.data import Batch
from nibble.spec.config import Optim
from nibble.train.checkpoint import Checkpoints
from nibble.train.state import Numbers, TrainState, rng_state, seed_everything, set_rng_state


def noisy(model: nn.Module, batch: Batch) -> Tensor:
    """Dropout, and a draw from each other generator."""
    factor = 1 + 0.01 * random.gauss(0, 1) + 0.01 * float(numpy.random.standard_normal())
    return next_token(model, batch) * factor


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        pairs = [(str(k), v) for k, v in tree.items()]
    elif isinstance(tree, list | tuple):
        pairs = [(str(i), v) for i, v in enumerate(tree)]
    else:
        return {prefix: tree}
    return {k: v for name, value in pairs for k, v in flatten(value, f"{prefix}/{name}").items()}


def assert_same(a: Any, b: Any) -> None:
    first, second = flatten(a), flatten(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        other = second[name]
        same = torch.equal(value, other) if isinstance(value, Tensor) else value == other
        assert same, name


def fresh(name: str, *, fp16: bool) -> TrainState:
    optim = Optim(name=name, learning_rate=1e-2, weight_decay=0.01, warmup_steps=2)  # type: ignore[arg-type]
    if name == "sgd":
        optim = Optim(name="sgd", learning_rate=1e-1, momentum=0.9)
    return make_state(optim=optim, dropout=0.2, fp16=fp16)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgd", "adafactor"])
@pytest.mark.parametrize("fp16", [False, True])
def test_three_and_three_steps_equal_six(name: str, fp16: bool, tmp_path: Path) -> None:
    straight = fresh(name, fp16=fp16)
    seed_everything(11)
    _, whole = run(straight, tmp_path / "a", objective=noisy)
    end = rng_state()

    first = fresh(name, fp16=fp16)
    seed_everything(11)
    _, before = run(first, tmp_path / "b", objective=noisy, max_steps=3)
    seed_everything(99)  # a new process has drawn other numbers
    second = fresh(name, fp16=fp16)
    Checkpoints(tmp_path / "b", keep=2).resume(second)
    assert second.step == 3
    _, after = run(second, tmp_path / "b", objective=noisy)

    assert {**before.losses, **after.losses} == whole.losses
    assert_same(straight.model.state_dict(), second.model.state_dict())
    assert_same(straight.optimizer.state_dict(), second.optimizer.state_dict())
    assert_same(Numbers.of(straight).as_dict(), Numbers.of(second).as_dict())
    assert_same(end, rng_state())
    for name_of in ("trained.safetensors", "optimizer.safetensors", "optimizer.json"):
        a, b = ((tmp_path / run_ / "checkpoint-6" / name_of).read_bytes() for run_ in "ab")
        assert a == b, name_of


def test_every_generator_comes_back() -> None:
    def draw() -> tuple[Any, ...]:
        return (
            torch.rand(3).tolist(), random.random(), random.gauss(0, 1),
            numpy.random.rand(3).tolist(), float(numpy.random.standard_normal()),
        )  # fmt: skip

    seed_everything(5)
    random.gauss(0, 1)  # leaves a second number waiting
    numpy.random.standard_normal()
    saved = rng_state()
    expected = draw()
    assert draw() != expected
    set_rng_state(saved)
    assert draw() == expected
