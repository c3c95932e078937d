"""Where tensors live: the placements of a recipe, by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from nibble.errors import PlacementError
from nibble.place.base import Placement
from nibble.place.group import Group
from nibble.spec.config import Optim, Place, Recipe
from nibble.spec.holdings import placement_kind

__all__ = ["PLACEMENTS", "Group", "Placement", "placement", "resolved"]

PLACEMENTS: dict[str, tuple[str, str]] = {
    "single": ("nibble.place.single", "Single"),
    "ddp": ("nibble.place.single", "Single"),
    "fsdp": ("nibble.place.fsdp", "Fsdp"),
    "stream": ("nibble.place.stream", "Stream"),
    "dp": ("nibble.place.dp", "DataParallel"),
    "deepspeed": ("nibble.place.deepspeed", "DeepSpeed"),
}
"""Kind: module and class; imported when asked for. Each takes (place, group)."""

ONE_PROCESS = ("single", "dp")


def resolved(recipe: Recipe, group: Group) -> Recipe:
    """The recipe with the placement that `auto` means in this group."""
    place = recipe.place.model_copy(update={"kind": placement_kind(recipe.place, group.world)})
    return recipe.model_copy(update={"place": place})


def placement(place: Place, group: Group, *, optim: Optim | None = None) -> Placement:
    """The placement that the recipe names, for this process.

    `optim`: what will step the trained parameters, where that decides how they are cut. Raises
    PlacementError for one that cannot be had with so many processes.
    """
    kind = placement_kind(place, group.world)
    if kind in ONE_PROCESS and group.world > 1:
        raise PlacementError(
            f"place.kind={kind} is one process, but {group.world} were started: "
            "use place.kind=ddp, fsdp or stream, or start one"
        )
    module, name = PLACEMENTS[kind]
    make: Callable[[Place, Group], Placement] = getattr(import_module(module), name)
    made = make(place, group)
    if optim is not None:
        made.expect(optim)
    return made
