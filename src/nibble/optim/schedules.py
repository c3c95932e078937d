"""Learning-rate schedules as one pure function of the step.

    warm-up    f(s) = s / W                                     for s < W
    after      f(s) = floor + (1 - floor) * shape(p),           p = (s - W) / (T - W), at most 1
    restarts   every R updates times min(1, (s mod R) / V), once s >= R     (arXiv 2307.05695)
    shape      constant 1;  linear 1 - p;  cosine (1 + cos(pi p)) / 2     (arXiv 1608.03983)

s is the number of updates made, so the first update of a warm-up has rate 0, as in transformers,
whose linear and cosine schedules these equal for floor 0. After T the rate stays at the floor.
Costs nothing. Not here: schedules in tokens, or rates that look at the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from nibble.errors import CheckpointError, ConfigError

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def factor(
    step: int, *, total_steps: int, warmup_steps: int, floor_ratio: float, name: str
) -> float:
    """Share of the peak learning rate for the update after `step` updates.

    Raises ConfigError for an unknown name or a warm-up longer than the run.
    """
    if name not in SHAPES:
        raise ConfigError(f"unknown schedule {name!r}: use one of {', '.join(SHAPES)}")
    if warmup_steps > total_steps:
        raise ConfigError(
            f"a warm-up of {warmup_steps} steps is longer than the run of {total_steps}: "
            "shorten the warm-up or train for longer"
        )
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor_ratio + (1.0 - floor_ratio) * SHAPES[name](progress)


def restarted(step: int, *, restart_every: int | None, warmup_steps: int) -> float:
    """Share that is left after the last restart: from 0 up to 1 in `warmup_steps` updates."""
    if restart_every is None or step < restart_every or warmup_steps == 0:
        return 1.0
    return min(1.0, (step % restart_every) / warmup_steps)


def num_warmup_steps(
    *, total_steps: int, warmup_steps: int | None, warmup_ratio: float | None
) -> int:
    """Warm-up in steps from either of its forms (a ratio is rounded up); ConfigError for both."""
    if warmup_steps is not None and warmup_ratio is not None:
        raise ConfigError(
            f"both warmup_steps={warmup_steps} and warmup_ratio={warmup_ratio} are given: keep one"
        )
    if warmup_steps is not None:
        return warmup_steps
    return math.ceil((warmup_ratio or 0.0) * total_steps)


class Schedule:
    """Sets the learning rates of an optimiser's groups: call `step()` after each update.

    Each group's peak is its `initial_lr` (its `lr` when the schedule is made). The state is one
    number; the groups of the optimiser hold the rest. Raises ConfigError as `factor` does.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        name: str,
        total_steps: int,
        warmup_steps: int = 0,
        floor_ratio: float = 0.0,
        restart_every: int | None = None,
        restart_warmup_steps: int = 0,
    ) -> None:
        self.restart_every = restart_every
        self.restart_warmup_steps = restart_warmup_steps
        self.optimizer = optimizer
        self.name = name
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.floor_ratio = floor_ratio
        self.num_updates = 0
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._apply()

    def step(self) -> None:
        """Go on to the next update's learning rate."""
        self.num_updates += 1
        self._apply()

    def factor(self) -> float:
        """The present share of the peak."""
        share = factor(
            self.num_updates,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            floor_ratio=self.floor_ratio,
            name=self.name,
        )
        return share * restarted(
            self.num_updates,
            restart_every=self.restart_every,
            warmup_steps=self.restart_warmup_steps,
        )

    def get_last_lr(self) -> list[float]:
        """Learning rate of each group, by torch's name for it."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        """The number of updates made."""
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go to a saved place; the optimiser's groups get the rate of that place."""
        if set(state_dict) != {"num_updates"}:
            raise CheckpointError(
                f"schedule state holds {sorted(state_dict)}, expected num_updates: "
                "the checkpoint was written by something else"
            )
        self.num_updates = int(state_dict["num_updates"])
        self._apply()

    def _apply(self) -> None:
        share = self.factor()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share
