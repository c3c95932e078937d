"""ReLoRA as something that happens after some updates, to the loop an update like any other.

Every `optim.restart_every` updates the adapters are merged into their bases and begin again with
fresh optimiser state; the schedule, a pure function of the step, warms up again by itself
(optim/schedules.py). Nothing is kept here: which restart it is follows from the number of updates.
"""

from __future__ import annotations

import torch
from torch import nn

from nibble.nn.merging import merge_and_restart_
from nibble.optim import Schedule


def restart_every_(
    num_updates: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    seed: int,
) -> None:
    """Hook restarts to the optimiser's step; the last one of the run is left out."""

    def after(*unused: object) -> None:
        made = schedule.num_updates + 1
        if made % num_updates or made >= schedule.total_steps:
            return
        restart = made // num_updates
        for parameter in merge_and_restart_(model, seed=seed, restart=restart):
            optimizer.state.pop(parameter, None)

    optimizer.register_step_post_hook(after)
