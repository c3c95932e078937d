"""`nibble plan`: the table for a person, or JSON for a program."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress

import typer

from nibble.errors import ConfigError, PlanError, WeightError
from nibble.spec.arch import architecture
from nibble.spec.config import Recipe
from nibble.spec.decide import decide
from nibble.spec.hardware import hardware
from nibble.spec.holdings import Devices
from nibble.spec.plan import Plan, plan
from nibble.use.machine import card_names


def make_plan(recipe: Recipe, *, gpu: str | None = None, gpus: int | None = None) -> Plan:
    """The plan of a recipe on the named card, or on this machine's; without one, on the CPU.

    `gpus`: how many of them share the run (default: place.num_devices, or all that are here).
    """
    shapes = architecture(recipe.model, num_labels=recipe.model.num_labels)
    names = card_names() if gpu is None else (gpu,)
    device = recipe.place.device
    on_cpu = device == "cpu" or (device == "auto" and not names)
    card = None
    if not on_cpu and names:
        # A card that the table does not know is planned for without a speed, unless it was named.
        with nullcontext() if gpu is not None else suppress(ConfigError):
            card = hardware(names[0])
    here = 1 if on_cpu or gpu is not None else max(1, len(names))
    number = gpus or recipe.place.num_devices or here
    if recipe.place.kind == "single" or ":" in device:
        number = 1
    devices = Devices(per_machine=number)
    made = decide(recipe, architecture=shapes, hardware=card, on_cpu=on_cpu, devices=devices)
    return plan(made, architecture=shapes, hardware=card, on_cpu=on_cpu, devices=devices)


def plan_or_none(recipe: Recipe) -> Plan | None:
    """The plan, or None when the model's shape is not known before it is fetched."""
    try:
        return make_plan(recipe)
    except (PlanError, WeightError):
        return None


def show_plan(
    recipe: Recipe, *, as_json: bool, gpu: str | None = None, gpus: int | None = None
) -> None:
    """Print the plan; a plan that does not fit its `place.vram` says so and what would."""
    made = make_plan(recipe, gpu=gpu, gpus=gpus)
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=1))
        return
    from rich.console import Console

    from nibble.spec.plan_text import render

    Console().print(render(made))
