"""`nibble plan`: the table for a person, or JSON for a program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import typer

from nibble.errors import ConfigError, PlanError, WeightError
from nibble.launch.devices import Card, unequal
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
    """The named card, or this machine's, of unequal ones the least; without one, the CPU.

    `gpus`: how many of them share the run (default: place.num_devices, or all that are here).
    """
    shape = shapes(recipe.model, num_labels=recipe.model.num_labels)
    names, number, on_cpu = _asked(recipe, gpu=gpu, gpus=gpus)
    card = None
    if on_cpu:
        with suppress(ConfigError):  # a processor has a row once it was measured
            card = hardware(CPU)
    elif names:
        # A card that the table does not know is planned for without a speed, unless a person named
        # it.
        with nullcontext() if gpu is not None else suppress(ConfigError):
            card = min(map(hardware, names), key=lambda row: (row.memory_bytes, row.matmul_flops))
    return Where(
        architecture=shape,
        hardware=card,
        on_cpu=on_cpu,
        devices=Devices(per_machine=number),
        is_here=gpu is None,
    )


def limited_by(recipe: Recipe, *, gpu: str | None = None, gpus: int | None = None) -> str | None:
    """A line about the card that limits the others of a run; None where they are equal."""
    names, _, _ = _asked(recipe, gpu=gpu, gpus=gpus)
    cards = []
    with suppress(ConfigError):
        for row in map(hardware, names):
            cards.append(Card(name=row.name, uuid="", total_bytes=row.memory_bytes))
    return unequal(cards)


def _asked(recipe: Recipe, *, gpu: str | None, gpus: int | None) -> tuple[Sequence[str], int, bool]:
    """Names of the cards that a run would use, how many processes it has, and whether it runs on
    the CPU."""
    names: Sequence[str] = card_names() if gpu is None else (gpu,)
    device = recipe.place.device
    on_cpu = device == "cpu" or (device == "auto" and not names)
    here = 1 if on_cpu or gpu is not None else max(1, len(names))
    number = gpus or recipe.place.num_devices or here
    if recipe.place.kind == "single" or ":" in device:
        number = 1
    index = device.partition(":")[2]
    first = int(index) if gpu is None and index.isdecimal() and int(index) < len(names) else 0
    return ([] if on_cpu else names[first : first + number]), number, on_cpu


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

    console = Console()
    console.print(render(made))
    if (limited := limited_by(recipe, gpu=gpu, gpus=gpus)) is not None:
        console.print(limited, markup=False, highlight=False)
