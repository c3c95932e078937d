"""`fit: auto` in a run: what is left open is decided on the machines that will train.

It happens once, when the processes have met and before anything is placed: the smallest card, the
slowest row of the table and the machine with least free memory decide for all, the first process
searches (spec/search.py) and tells the others. The run folder keeps the decided recipe, so a
resumed run takes its choices from there and never searches again: another micro-batch or another
order of sums half-way would be another run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from nibble.errors import ConfigError
from nibble.models.locate import locate
from nibble.place import Group
from nibble.place.host_memory import available_bytes
from nibble.spec.choices import fixed_paths
from nibble.spec.config import Recipe
from nibble.spec.fit_text import lines
from nibble.spec.given import ALLOWED, ALWAYS
from nibble.spec.hardware import CPU, Hardware, hardware
from nibble.spec.holdings import Devices
from nibble.spec.phases import CUDA_CONTEXT_BYTES
from nibble.spec.planner import budget_of
from nibble.spec.search import Found, search
from nibble.train.folder import RECIPE, read_recipe
from nibble.use.shapes import shapes


def fitted(recipe: Recipe, group: Group, *, resume: bool = False) -> tuple[Recipe, list[str]]:
    """The recipe with everything decided, on all processes, and lines that say what was chosen.

    A recipe without `fit` is returned as it is. Raises PlanError where nothing fits, ConfigError
    where nothing is left to choose.
    """
    if recipe.fit is None:
        return recipe, []
    there = group.gather(_facts(group), "what each machine has")
    found = group.first_does("fit", lambda: _decide(recipe, group, there, resume=resume))
    decided, told = group.share(found, "the fitted recipe")
    return Recipe.model_validate(json.loads(decided)), list(told)


def _decide(
    recipe: Recipe, group: Group, there: list[dict[str, Any]], *, resume: bool
) -> tuple[str, list[str]]:
    """As JSON, and in words."""
    stored = Path(recipe.output_dir) / RECIPE
    if resume and stored.is_file():
        adopted = adopt(recipe, read_recipe(stored))
        return adopted.model_dump_json(exclude_unset=True), [
            f"fit was decided when the run was started: see {stored}"
        ]
    found = _search(recipe, group, there)
    # As `nibble train` would read the written recipe: all that it holds is given.
    return found.recipe.model_dump_json(exclude_unset=True), lines(found)


def adopt(recipe: Recipe, stored: Recipe) -> Recipe:
    """The recipe with the choices of a run that was decided before; what is given now stays."""
    assert recipe.fit is not None, "a recipe with something open"
    paths = [*ALWAYS, *(path for word in recipe.fit.allow for path in ALLOWED[word])]
    values = recipe.model_dump(mode="json", exclude_unset=True)
    kept = stored.model_dump(mode="json", exclude_unset=True)
    for path in paths:
        section, _, key = path.partition(".")
        if kept.get(section, {}).get(key) == "single":
            continue  # one device may be several now, and `auto` means the same on one
        if path not in fixed_paths(recipe) and key in kept.get(section, {}):
            values.setdefault(section, {})[key] = kept[section][key]
    values["fit"] = None
    return Recipe.model_validate(values)


def _search(recipe: Recipe, group: Group, there: list[dict[str, Any]]) -> Found:
    model = recipe.model
    path = locate(model.path, revision=model.revision, with_code=model.trust_remote_code)
    local = model.model_copy(update={"path": str(path), "revision": None})
    cards = [_card(facts["card"]) for facts in there]
    known = [card for card in cards if card is not None]
    slowest = min(known, key=lambda card: card.matmul_flops) if len(known) == len(cards) else None
    on_cpu = group.device.type == "cpu"
    per_machine = group.local_world
    if recipe.place.kind == "dp":
        per_machine = recipe.place.num_devices or torch.cuda.device_count()
    sizes = [facts["device_bytes"] for facts in there if facts["device_bytes"] is not None]
    return search(
        recipe,
        architecture=shapes(local, num_labels=model.num_labels),
        hardware=slowest,
        on_cpu=on_cpu,
        devices=Devices(per_machine=per_machine, machines=max(1, group.world // group.local_world)),
        budget=budget_of(
            recipe,
            device_bytes=min(sizes, default=None),
            host_bytes=min(facts["host_bytes"] for facts in there),
            on_cpu=on_cpu,
            card=there[0]["card"] or "the card",
        ),
    )


def _facts(group: Group) -> dict[str, Any]:
    """What this process has: its card by name, bytes that a run may take there and on the host."""
    facts: dict[str, Any] = {"card": None, "device_bytes": None, "host_bytes": available_bytes()}
    if group.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(group.device)
        facts["card"] = torch.cuda.get_device_name(group.device)
        # This process's own context is taken already, and planned.
        facts["device_bytes"] = min(total, free + CUDA_CONTEXT_BYTES)
    return facts


def _card(name: str | None) -> Hardware | None:
    """The card's row, or the processor's, which has one once it was measured."""
    try:
        return hardware(name or CPU)
    except ConfigError:
        return None  # no speed then: the fewest FLOPs a token are taken for the fastest
