"""Which launches find the variant that an earlier one compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nibble.kernels.launch import launch


class Kernel:
    """Counts what Triton would be asked for, and what a variant is launched with."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def call(*values: Any, **words: Any) -> Variant:
            self.asked.append(values[1:])
            return Variant(self)

        return call


class Variant:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *values: self.kernel.direct.append(values[1:])


def test_numbers_that_change_find_the_same_variant() -> None:
    kernel, x = Kernel(), torch.zeros(64)
    words: dict[str, Any] = {"num_warps": 4, "changing": slice(1, 3)}
    for rate, key in ((0.1, 7), (0.2, -9), (0.0, 2**31 - 1)):
        launch(kernel, (1,), (x,), 64, rate, key, True, **words)
    assert kernel.asked == [(64, 0.1, 7, True)]
    assert kernel.direct == [(64, 0.2, -9, True), (64, 0.0, 2**31 - 1, True)]
    launch(kernel, (1,), (x,), 64, 0.1, 2**31, True, **words)  # passed as 64 bits
    launch(kernel, (1,), (x,), 128, 0.1, 7, True, **words)
    launch(kernel, (1,), (x,), 64, 0.1, 7, False, **words)
    launch(kernel, (1,), (x.bfloat16(),), 64, 0.1, 7, True, **words)
    assert len(kernel.asked) == 5


def test_without_numbers_that_change_each_one_counts() -> None:
    kernel, x = Kernel(), torch.zeros(64)
    for rate in (0.1, 0.2, 0.1):
        launch(kernel, (1,), (x,), 64, rate, num_warps=4)
    assert kernel.asked == [(64, 0.1), (64, 0.2)] and kernel.direct == [(64, 0.1)]
    launch(kernel, (1,), (x[1:],), 64, 0.1, num_warps=4)  # not aligned
    assert len(kernel.asked) == 3
