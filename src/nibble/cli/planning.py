"""`nibble plan`: the table for a person, or JSON for a program."""

from __future__ import annotations

import json

import typer

from nibble.errors import PlanError, WeightError
from nibble.spec.arch import architecture
from nibble.spec.config import Recipe
from nibble.spec.plan import Plan, plan


def make_plan(recipe: Recipe) -> Plan:
    """The plan of a recipe on the hardware that it names."""
    shapes = architecture(recipe.model, num_labels=recipe.model.num_labels)
    return plan(recipe, architecture=shapes)


def plan_or_none(recipe: Recipe) -> Plan | None:
    """The plan, or None when the model's shape is not known before it is fetched."""
    try:
        return make_plan(recipe)
    except (PlanError, WeightError):
        return None


def show_plan(recipe: Recipe, *, as_json: bool) -> None:
    """Print the plan; a plan that does not fit its `place.vram` says so and what would."""
    made = make_plan(recipe)
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=1))
        return
    from rich.console import Console

    from nibble.spec.plan_text import render

    Console().print(render(made))
