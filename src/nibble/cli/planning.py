"""`nibble plan`: the table for a person, or JSON for a program."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import typer

from nibble.errors import ConfigError, PlanError, WeightError
from nibble.spec.arch import Architecture
from nibble.spec.config import Recipe
from nibble.spec.decide import decide
from nibble.spec.hardware import CPU, Hardware, hardware
from nibble.spec.holdings import Devices
from nibble.spec.plan import Plan, plan
from nibble.use.machine import card_names
from nibble.use.shapes import shapes


@dataclass(frozen=True, kw_only=True)
class Where:
    """The shape of a recipe's model and the devices that it is planned for; `is_here`: those of
    this machine."""

    architecture: Architecture
    hardware: Hardware | None
    on_cpu: bool
    devices: Devices
    is_here: bool


def where(recipe: Recipe, *, gpu: str | None = None, gpus: int | None = None) -> Where:
    """The named card, or this machine's; without one, the CPU.

    `gpus`: how many of them share the run (default: place.num_devices, or all that are here).
    """
    shape = shapes(recipe.model, num_labels=recipe.model.num_labels)
    names = card_names() if gpu is None else (gpu,)
    device = recipe.place.device
    on_cpu = device == "cpu" or (device == "auto" and not names)
    card = None
    if on_cpu or names:
        # A card that the table does not know is planned for without a speed, unless it was named; a
        # processor has a row once it was measured.
        with nullcontext() if gpu is not None and not on_cpu else suppress(ConfigError):
            card = hardware(CPU if on_cpu else names[0])
    here = 1 if on_cpu or gpu is not None else max(1, len(names))
    number = gpus or recipe.place.num_devices or here
    if recipe.place.kind == "single" or ":" in device:
        number = 1
    return Where(
        architecture=shape,
        hardware=card,
        on_cpu=on_cpu,
        devices=Devices(per_machine=number),
        is_here=gpu is None,
    )


def make_plan(recipe: Recipe, *, gpu: str | None = None, gpus: int | None = None) -> Plan:
    """The plan of a recipe where `where` says; of one to be fitted the fastest that fits."""
    if recipe.fit is not None:
        from nibble.cli.fitting import fitted

        return fitted(recipe, gpu=gpu, gpus=gpus).plan
    there = where(recipe, gpu=gpu, gpus=gpus)
    words = {
        "hardware": there.hardware,
        "on_cpu": there.on_cpu,
        "devices": there.devices,
    }
    made = decide(recipe, architecture=there.architecture, **words)  # type: ignore[arg-type]
    return plan(made, architecture=there.architecture, **words)  # type: ignore[arg-type]


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
    if recipe.fit is not None:
        from nibble.cli.fitting import show_fit

        show_fit(recipe, as_json=as_json, gpu=gpu, gpus=gpus, out=None)
        return
    made = make_plan(recipe, gpu=gpu, gpus=gpus)
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=1))
        return
    from rich.console import Console

    from nibble.spec.plan_text import render

    Console().print(render(made))
