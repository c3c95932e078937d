"""What a run begins with, once its model has its weights: optimiser, schedule and all else that is
carried from step to step.
"""

from __future__ import annotations

import torch
from torch import nn

from nibble import optim
from nibble.nn.merging import merged_weights
from nibble.place.base import Placement
from nibble.spec.config import Recipe
from nibble.spec.methods import has_int8_weights
from nibble.train.int8_weights import keep_
from nibble.train.restarts import restart_every_
from nibble.train.state import LossScaler, Steps, TrainState
from nibble.use.assemble import storage_dtype


def training_state(
    recipe: Recipe, model: nn.Module, place: Placement, loader: Steps, *, total_steps: int
) -> TrainState:
    """What a run carries from step to step, of a model that has its weights."""
    trained = place.trained(model)
    optimizer, schedule = optim.build(
        trained,
        recipe.optim,
        total_steps=total_steps,
        seed=recipe.train.seed,
        views={name: place.view(name) for name in trained},
    )
    state = TrainState(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        loader=loader,
        scaler=LossScaler(enabled=recipe.train.precision == "fp16"),
        parameters=trained,
        place=place,
    )
    if has_int8_weights(recipe.optim):
        state.instead = keep_(optimizer, model)
    if recipe.optim.restart_every is not None:
        restart_every_(
            recipe.optim.restart_every,
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            seed=recipe.train.seed,
        )
        state.parameters = {**trained, **merged_weights(model)}
    return state


def autocast_of(recipe: Recipe) -> torch.dtype | None:
    """What fp32 weights compute in."""
    is_mixed = recipe.train.precision == "fp16" and storage_dtype(recipe) == torch.float32
    return torch.float16 if is_mixed else None
