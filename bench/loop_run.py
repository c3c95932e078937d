"""nibble's training loop over a model that a benchmark has filled, to be stepped by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nibble.place.base import Placement
from nibble.spec.graphs import wish
from nibble.train.begin import autocast_of, training_state
from nibble.train.checkpoint import Checkpoints
from nibble.train.interrupt import Interrupt
from nibble.train.loop import Settings, _Run
from nibble.train.report import Report
from nibble.use.assemble import Assembly
from nibble.use.objective import objective

NUM_SCHEDULED_STEPS = 1000


def loop_run(assembly: Assembly, place: Placement, folder: Path) -> _Run:
    """What `run.train` hands to the loop, with nothing to load from and nowhere to report to."""
    recipe, model = assembly.recipe, assembly.model
    nothing: Any = iter(())
    state = training_state(recipe, model, place, nothing, total_steps=NUM_SCHEDULED_STEPS)
    loss = place.around(
        objective(
            assembly.built.family, task=recipe.model.task, chunk=recipe.train.loss_chunk_tokens
        )
    )
    settings = Settings(
        max_steps=NUM_SCHEDULED_STEPS,
        steps_per_epoch=float(NUM_SCHEDULED_STEPS),
        max_grad_norm=recipe.optim.max_grad_norm,
        graphs=wish(recipe),
        autocast=autocast_of(recipe),
    )
    model.train()
    checkpoints = Checkpoints(folder / "run", keep=1)
    return _Run(state, place, loss, settings, Report(), checkpoints, None, Interrupt())
