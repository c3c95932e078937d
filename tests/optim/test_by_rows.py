"""Adafactor on large tensors: rows at a time it is what it is on whole tensors, in less memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nibble.optim import Optimizer, by_rows
from nibble.optim.shards import ShardView

SHAPES = {"matrix": (200, 48), "thin": (70, 3), "stack": (3, 32, 40)}
FEW_BYTES = 24 * 1000
"""Of temporaries: a thousand elements at a time."""


def few(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """Take tensors by rows, and some thousand bytes at a time."""
    monkeypatch.setattr(by_rows, "BATCH_NBYTES", nbytes)
    monkeypatch.setattr(by_rows, "WHOLE_NBYTES", 0)


def gradients(shape: tuple[int, ...], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    sizes = torch.rand(shape[-2], 1, generator=generator) * 3
    return torch.randn(shape, generator=generator) * sizes


def stepped(
    shape: tuple[int, ...], dtype: torch.dtype, words: dict[str, Any], *, steps: int = 5
) -> tuple[Tensor, dict[str, Any]]:
    weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype))
    optimizer = Optimizer([weight], lr=1e-2, weight_decay=0.1, seed=3, **words)
    for step in range(steps):
        weight.grad = gradients(shape, step).to(dtype)
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        ({"rule": "adafactor"}, torch.float32),
        ({"rule": "adafactor", "parameter_scale": 1e-3}, torch.bfloat16),
        ({"rule": "adafactor", "codec": "bf16"}, torch.bfloat16),
        ({"rule": "adafactor_momentum"}, torch.float32),
        ({"rule": "adafactor_momentum", "codec": "bf16"}, torch.bfloat16),
        ({"rule": "adafactor_momentum", "codec": "8bit"}, torch.float32),
    ],
)
def test_rows_at_a_time_are_the_whole(
    shape: str, words: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {**words, "stochastic_rounding": dtype == torch.bfloat16}
    expected, state = stepped(SHAPES[shape], dtype, words)
    few(monkeypatch, FEW_BYTES if shape != "thin" else 24 * 60)
    num = count_steps(monkeypatch)
    found, own = stepped(SHAPES[shape], dtype, words)
    assert num() == 5
    if dtype == torch.bfloat16:
        # A sum in another order may turn the rounding of an element now and then, not more.
        assert (found != expected).float().mean() < 0.01
    bound = 1e-6 if dtype == torch.float32 and words.get("codec") != "8bit" else 2e-3
    assert (found - expected).norm() <= bound * expected.float().norm()
    assert own.keys() == state.keys()
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            assert torch.allclose(own[name].float(), value.float(), rtol=1e-2, atol=1e-6), name


def test_it_holds_some_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"rule": "adafactor"}
    with Largest() as before:
        stepped(SHAPES["matrix"], torch.bfloat16, words, steps=1)
    few(monkeypatch, FEW_BYTES)
    with Largest() as after:
        stepped(SHAPES["matrix"], torch.bfloat16, words, steps=1)
    assert before.float32 >= 200 * 48
    assert after.float32 <= 2000


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("rule", ["adafactor", "adafactor_momentum"])
def test_parts_step_as_the_whole(dim: int, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["matrix"]
    expected, _ = stepped(shape, torch.float32, {"rule": rule})
    few(monkeypatch, FEW_BYTES)
    cut = (shape[dim] * 2) // 3
    bounds = [(0, cut), (cut, shape[dim])]
    sums, parts = _sums(len(bounds)), {}

    def work(rank: int) -> None:
        begin, end = bounds[rank]
        start = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        weight = nn.Parameter(start.narrow(dim, begin, end - begin).contiguous())
        view = ShardView(shape=shape, dim=dim, start=begin, sum_=sums(rank))
        optimizer = Optimizer(
            [weight], lr=1e-2, weight_decay=0.1, seed=3, rule=rule, views={weight: view}
        )
        for step in range(5):
            weight.grad = gradients(shape, step).narrow(dim, begin, end - begin).contiguous()
            optimizer.step()
        parts[rank] = weight.detach()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    found = torch.cat([parts[0], parts[1]], dim)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def _sums(world: int) -> Callable[[int], Callable[[Sequence[Tensor]], None]]:
    """Sums over threads, as a placement's are over processes."""
    barrier, given = threading.Barrier(world, timeout=30), {}

    def of(rank: int) -> Callable[[Sequence[Tensor]], None]:
        def sum_(tensors: Sequence[Tensor]) -> None:
            given[rank] = [tensor.clone() for tensor in tensors]
            barrier.wait()
            for index, tensor in enumerate(tensors):
                tensor.copy_(sum(given[other][index] for other in range(world)))
            barrier.wait()

        return sum_

    return of


def count_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often a tensor was stepped by rows."""
    from nibble.optim import plain_step

    real, seen = plain_step.step_by_rows_, []

    def counted(*args: Any, **words: Any) -> None:
        seen.append(args)
        real(*args, **words)

    monkeypatch.setattr(plain_step, "step_by_rows_", counted)
    return lambda: len(seen)


class Largest(TorchDispatchMode):
    """Elements of the largest float32 tensor that was made since gradients were first squared."""

    def __init__(self) -> None:
        super().__init__()
        self.float32 = 0
        self.began = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.began = self.began or func.overloadpacket.__name__ == "pow"
        for value in tree_leaves(made):
            if self.began and isinstance(value, Tensor) and value.dtype == torch.float32:
                self.float32 = max(self.float32, value.numel())
        return made
