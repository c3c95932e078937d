"""`nibble train` becomes one process or several: who decides, and on what.

    started by torchrun, mpirun, srun    this is one of the processes: train
    one device                           train here
    several devices, or several machines start a process for each device and see them to their end

Everything that can be refused is refused here, before a process is started or torch is imported.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from nibble.errors import ConfigError
from nibble.launch.devices import check_launched, num_processes, unequal, visible_cards
from nibble.launch.environment import Launch, detect
from nibble.launch.meeting import Nodes, nodes_of, with_interface
from nibble.launch.supervise import QUIET, Job, holds_run, supervise
from nibble.spec.config import Recipe
from nibble.spec.rules import check_trainable


@dataclass(frozen=True, kw_only=True)
class Start:
    """How to start: the words of the command line that are not the recipe's.

    `resume`: go on with the run in its folder; `resume_if_begun`: if there is one.
    """

    resume: bool = False
    resume_if_begun: bool = False
    nodes: Nodes | None = None
    max_restarts: int = 0


def train_recipe(recipe: Recipe, start: Start) -> None:
    """Train the recipe on all devices that it may use. Raises NibbleError, or KeyboardInterrupt
    when the run was interrupted and saved.
    """
    check_trainable(recipe)
    os.environ.setdefault(*QUIET)  # before torch is imported, for machines and processes to meet
    resume = start.resume or (start.resume_if_begun and holds_run(recipe))
    launch = detect(os.environ)
    nodes = _nodes(start, launch)
    if launch is not None and launch.starts == "processes":
        _join(recipe, launch)
        _train_here(recipe, resume=resume)
        return
    cards = visible_cards(os.environ) if recipe.place.device != "cpu" else []
    count = num_processes(recipe.place, cards)
    if nodes is None and count == 1 and start.max_restarts == 0:
        _train_here(recipe, resume=resume)
        return
    limit = unequal(cards[:count])
    if limit is not None:
        _note(limit)
    job = Job(
        recipe=recipe.model_dump_json(),
        resume=resume,
        typed=tuple(sys.argv),
        debug="--debug" in sys.argv,
    )
    supervise(
        recipe,
        job,
        num_processes=count,
        nodes=nodes,
        max_restarts=start.max_restarts,
        note=_note,
        environment=os.environ,
    )


def _nodes(start: Start, launch: Launch | None) -> Nodes | None:
    """The machines of the run; None for this one alone."""
    if start.nodes is not None:
        if launch is not None and launch.world > 1:
            raise ConfigError(
                f"{launch.launcher} has already started {launch.world} processes: leave out --nodes"
            )
        return start.nodes if start.nodes.most > 1 else None
    if launch is None or launch.starts == "processes" or launch.world == 1:
        return None
    return nodes_of(launch)


def _join(recipe: Recipe, launch: Launch) -> None:
    """Say in torchrun's words what another launcher said in its own."""
    check_launched(recipe.place, launch)
    os.environ.update(launch.environment())
    if launch.nodes > 1:
        os.environ.update(with_interface(os.environ, launch.master, launch.port))


def _train_here(recipe: Recipe, *, resume: bool) -> None:
    from nibble.cli.training import train_here

    train_here(recipe, resume=resume)


def _note(text: str) -> None:
    sys.stderr.write(f"note: {text}\n")
