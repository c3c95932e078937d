"""Adapters that are added to their bases during training, and begin again.

    W <- W + s B A,   A random again, B = 0

ReLoRA (arXiv 2307.05695): a sum of many low-rank updates is not of low rank. The sum is made in
float32, a matrix at a time, and rounded once to the type of W; new values of A depend on seed,
name and the number of the restart. The base must be an ordinary linear: a packed one would be
packed again at every restart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nibble.nn.adapters import adapters


def merged_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The bases that adapters are merged into, by their names in the model."""
    return {
        f"{name}.base.weight": adapter.base.weight  # type: ignore[misc]
        for name, adapter in adapters(model).items()
    }


@torch.no_grad()
def merge_and_restart_(model: nn.Module, *, seed: int, restart: int) -> list[Tensor]:
    """Merge every adapter and give it new values; returns the parameters that began again."""
    begun: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed * 1_000_003 + restart)
    for name, adapter in adapters(model).items():
        weight = adapter.base.weight
        assert isinstance(weight, Tensor)
        weight.copy_(weight.float() + adapter.delta())
        adapter.reset_parameters_(name, generator=generator)
        begun += [adapter.lora_A, adapter.lora_B]
    return begun
