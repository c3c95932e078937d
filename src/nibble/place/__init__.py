"""Where tensors live: the placements of a recipe, by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from nibble.place.base import Placement
from nibble.place.group import Group
from nibble.spec.config import Place

__all__ = ["PLACEMENTS", "Group", "Placement", "placement"]

PLACEMENTS: dict[str, tuple[str, str]] = {
    "single": ("nibble.place.single", "Single"),
    "ddp": ("nibble.place.single", "Single"),
    "fsdp": ("nibble.place.fsdp", "Fsdp"),
    "stream": ("nibble.place.stream", "Stream"),
    "dp": ("nibble.place.dp", "DataParallel"),
    "deepspeed": ("nibble.place.deepspeed", "DeepSpeed"),
}
"""Kind: module and class; imported when asked for. Each takes (place, group)."""


def resolve(place: Place, world: int) -> str:
    """What `auto` means in a world of this size."""
    if place.kind != "auto":
        return place.kind
    return "single" if world == 1 else "ddp"


def placement(place: Place, group: Group) -> Placement:
    """The placement that the recipe names, for this process."""
    module, name = PLACEMENTS[resolve(place, group.world)]
    make: Callable[[Place, Group], Placement] = getattr(import_module(module), name)
    return make(place, group)
