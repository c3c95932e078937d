"""`nibble train`: the plan, the run, and what to do next."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console

from nibble.cli.planning import plan_or_none
from nibble.cli.quiet import quiet_libraries
from nibble.spec.config import Recipe
from nibble.spec.imports import without_collector
from nibble.spec.units import show_bytes

if TYPE_CHECKING:
    from nibble.place.base import Memory
    from nibble.spec.plan import Plan


def train_here(recipe: Recipe, *, resume: bool) -> None:
    """Print the plan, train, and print the commands to go on with; among several processes only
    the first one prints.
    """
    console = Console(highlight=False, quiet=os.environ.get("RANK", "0") != "0")
    decided_before = resume and recipe.fit is not None
    made = None if console.quiet or decided_before else plan_or_none(recipe)
    if made is not None:
        from nibble.spec.plan_text import render

        console.print(render(made))
        console.print()
    with without_collector():
        from nibble.run import train

        quiet_libraries()
    result = train(recipe, resume=resume)
    outcome = result.outcome
    if outcome.interrupted:
        raise KeyboardInterrupt
    before, after = outcome.eval_loss_before, outcome.eval_loss_after
    if before is not None and after is not None:
        console.print(f"held-out loss {before:.4f} before, {after:.4f} after")
    console.print(measured_line(result.plan, result.memory), markup=False)
    if result.plan is not None and result.memory.reserved_bytes:
        console.print(phases_line(result.plan, result.phases), markup=False)
    console.print(f"checkpoint: {outcome.checkpoint}", markup=False)
    console.print(next_commands(recipe), markup=False)


def measured_line(planned: Plan | None, memory: Memory) -> str:
    """Planned against measured peak memory, of the card or, without one, of the host."""
    on_card = memory.reserved_bytes > 0
    measured = memory.reserved_bytes if on_card else memory.host_bytes
    where = "GPU" if on_card else "host"
    if planned is None:
        return f"peak {where} memory {show_bytes(measured)} (not planned)"
    expected = planned.allocator_bytes if on_card else planned.host_bytes
    return (
        f"peak {where} memory {show_bytes(measured)}, planned {show_bytes(expected)} "
        f"({measured / expected - 1:+.0%})"
    )


def phases_line(planned: Plan, phases: Mapping[str, Memory]) -> str:
    """Each phase's peak on the card, measured and planned."""
    expected = {phase.name: phase for phase in planned.phases}
    told = []
    for name, seen in phases.items():
        device = expected[name].device
        told.append(
            f"{name} {show_bytes(seen.reserved_bytes)} "
            f"({show_bytes(sum(device.values()) - device.get('cuda_context', 0))})"
        )
    return "by phase, measured (planned): " + ", ".join(told)


def next_commands(recipe: Recipe) -> str:
    """What a person does with a finished run."""
    run = recipe.output_dir
    lines = [] if recipe.model.task == "classification" else [f"nibble chat {run}"]
    lines.append(f"nibble eval {run}")
    kinds = ["adapter", "merged"] if recipe.adapter.kind in ("lora", "dora") else ["hf"]
    lines += [f"nibble export {run} --to {kind}" for kind in kinds]
    return "\n".join(["", "go on with:", *(f"  {line}" for line in lines)])
