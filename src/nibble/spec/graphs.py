"""Which recipes may run their micro-batches as CUDA graphs.

A graph replays kernels on the memory that they were recorded with. So nothing in a micro-batch may
ask the host what to do next, and nothing but kernels may matter: no hooks that step in backward, no
pulls of weights, no copies of activations behind the computation.
"""

from __future__ import annotations

from typing import Literal

from .config import Recipe
from .methods import has_int8_weights

Wish = Literal["off", "auto", "on"]
"""`on` records whatever can be recorded, `auto` only where it pays."""


def cannot_be_recorded(recipe: Recipe) -> str:
    """The setting that a graph cannot serve, or an empty string."""
    place, train, optim = recipe.place, recipe.train, recipe.optim
    if place.device == "cpu":
        return "place.device=cpu"
    if place.kind not in ("auto", "single", "ddp"):
        return f"place.kind={place.kind}"
    if recipe.model.task == "classification":
        return "model.task=classification"
    if train.activation_offload:
        return "train.activation_offload"
    if optim.layerwise or has_int8_weights(optim):
        return "optim.layerwise" if optim.layerwise else "optim.weights=int8"
    if recipe.adapter.dropout and train.activation_checkpointing != "none":
        return (
            f"adapter.dropout={recipe.adapter.dropout:g} and "
            f"train.activation_checkpointing={train.activation_checkpointing}"
        )
    return ""


def wish(recipe: Recipe) -> Wish:
    """What the recipe wants of graphs, as far as the recipe alone can tell."""
    if recipe.train.cuda_graphs is False or cannot_be_recorded(recipe):
        return "off"
    if recipe.train.cuda_graphs is True:
        return "on"
    # Packed rows come in many shapes: each passes eagerly once, beside what recorded ones keep, and
    # the peak would be that of two passes (14.2 instead of 9.9 GiB for an 8B at 4x2048).
    return "off" if recipe.data.packing else "auto"
