"""`nibble plan --fit`: the fastest recipe for a card, why it is, and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import typer

from nibble.cli.planning import Where, limited_by, where
from nibble.errors import ConfigError
from nibble.launch.devices import visible_cards
from nibble.spec import fit_text, recipes
from nibble.spec.config import Recipe
from nibble.spec.load import load_recipe
from nibble.spec.plan_text import render
from nibble.spec.planner import budget_of
from nibble.spec.search import Found, search
from nibble.spec.texts import nearest
from nibble.use.machine import host_memory

DEFAULT_METHOD = "qlora"
OUT = Path("fitted.yaml")


def recipe_to_fit(
    recipe: str | None,
    words: Sequence[str],
    *,
    fit: bool,
    model: str | None,
    method: str | None,
    ram: str | None,
    tokens: int | None,
) -> Recipe:
    """The recipe that the command line means; `method` names a built-in one where no file does."""
    if recipe is not None and method is not None:
        raise ConfigError(f"--method {method} beside the recipe {recipe}: give one of them")
    if method is not None and method not in recipes.names():
        near = nearest(method, recipes.names()) or recipes.names()
        raise ConfigError(f"--method {method} is no built-in recipe: {', '.join(near)}")
    named = {"model.path": model, "place.ram": ram, "data.max_length": tokens}
    typed = [f"{key}={value}" for key, value in named.items() if value is not None]
    asked = ["fit=auto"] if fit else []
    return load_recipe(recipe or method or DEFAULT_METHOD, [*asked, *typed, *words])


def fitted(recipe: Recipe, *, gpu: str | None = None, gpus: int | None = None) -> Found:
    """The fastest recipe on the named card, or on this machine's."""
    there = where(recipe, gpu=gpu, gpus=gpus)
    budget = budget_of(
        recipe,
        device_bytes=_device_bytes(there),
        host_bytes=host_memory()[1] if there.is_here else None,
        on_cpu=there.on_cpu,
        card="the card" if there.hardware is None else there.hardware.name,
    )
    return search(
        recipe,
        architecture=there.architecture,
        hardware=there.hardware,
        on_cpu=there.on_cpu,
        devices=there.devices,
        budget=budget,
    )


def _device_bytes(there: Where) -> int | None:
    if there.on_cpu:
        return None
    known = [] if there.hardware is None else [there.hardware.memory_bytes]
    if there.is_here:
        known += [card.total_bytes for card in visible_cards(os.environ) if card.total_bytes]
    return min(known, default=None)


def show_fit(
    recipe: Recipe, *, as_json: bool, gpu: str | None, gpus: int | None, out: Path | None
) -> None:
    """Print what was chosen and what its neighbours would cost; write the recipe to `out`."""
    if out is not None:
        check_writable(out)
    found = fitted(recipe, gpu=gpu, gpus=gpus)
    if out is not None:
        out.write_text(fit_text.text(found), encoding="utf-8")
    if as_json:
        told = fit_text.to_json(found) | {"written": None if out is None else str(out)}
        typer.echo(json.dumps(told, indent=1))
        return
    from rich.console import Console

    console = Console()
    console.print(render(found.plan))
    if (limited := limited_by(recipe, gpu=gpu, gpus=gpus)) is not None:
        console.print(limited, markup=False, highlight=False)
    console.print()
    console.print(fit_text.render(found))
    if out is not None:
        data = "" if found.recipe.data.train else " data.train=FILE"
        console.print(f"written: {out}; go on with: nibble train {out}{data}", markup=False)


def check_writable(out: Path) -> None:
    """Raise ConfigError for a file that holds anything else than such a recipe."""
    if not out.exists():
        return
    if not out.is_file() or not out.read_text(errors="replace").startswith(fit_text.MARK):
        raise ConfigError(
            f"{out} exists and was not written by nibble plan --fit: name another with --out"
        )
