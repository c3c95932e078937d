"""Which modules draw random numbers, and how to draw the same ones again.

Whoever computes something twice (checkpointed blocks, tiles of a feed-forward layer) must give
dropout the same numbers both times. Keeping the generators' states costs some 50 us a block, so it
is done only where a module could draw: one with a positive probability or noise among its own
attributes or its configuration's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

WORDS = ("drop", "jitter", "noise")
DROPOUT_CLASSES = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout")


def may_draw(module: nn.Module) -> bool:
    """Whether a forward pass of `module` in training may draw random numbers; True when in doubt.

    Looks for positive numbers named dropout, jitter or noise in every submodule and its config.
    """
    for inner in module.modules():
        if type(inner).__name__ in DROPOUT_CLASSES and vars(inner).get("p", 1.0) > 0:
            return True
        config = vars(inner).get("config")
        tables = [vars(inner)] if config is None else [vars(inner), vars(config)]
        if any(_draws(name, value) for table in tables for name, value in table.items()):
            return True
    return False


def _draws(name: str, value: object) -> bool:
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    return is_number and value != 0 and any(word in name for word in WORDS)


class Generators:
    """The states of the CPU's default generator and of a device's, as they are now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw from here; afterwards the generators are where they were before."""
        with torch.random.fork_rng([] if self.own is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.own is not None:
                torch.cuda.set_rng_state(self.own, self.device)
            yield
