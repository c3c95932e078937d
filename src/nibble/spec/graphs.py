"""Which recipes may run their micro-batches as CUDA graphs.

A graph replays kernels on the memory that they were recorded with. So nothing in a micro-batch may
ask the host what to do next, and nothing but kernels may matter: no hooks that step in backward, no
pulls of weights, no copies of activations behind the computation.

What recorded passes allocate is a pool of their own that stays between them, and their gradients
stay as well. So memory of a run with graphs is

    what stays + gradients + the largest moment of a pass + that of an update or an evaluation

where eager code has the largest of the last two alone, and the last is SPARE_BYTES at least, which
a recording leaves free or is not made. `auto` is decided in `decide.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from .config import Recipe
from .methods import has_int8_weights

Wish = Literal["off", "on"]
HOST_SHARE = 0.75
"""`auto`: of the device's time for a pass, what the host must need for a recording to pay."""
MAX_GRAD_BYTES = 1 << 30
"""`auto`: of the gradients, which are kept from step to step."""
SPARE_BYTES = 256 << 20
"""For what runs between passes: temporaries of an optimiser's step (optim/batches.py)."""
STREAM_BYTES = 64 << 20
"""Of the pool: what cuBLAS keeps for the stream that is recorded, on Hopper."""
PLACEMENTS = ("single", "ddp")
"""Where a pass is kernels alone."""
UPDATE = "the update"
"""The moment of a step that is not recorded."""
POOLED = ("activations_kept", "activation_workspace", "dequantised", "logits")
"""Categories of the plan that a recorded pass takes from its pool."""
Moments = Mapping[str, Mapping[str, int]]
"""Bytes by category of a phase's moments (phases.py)."""


def cannot_be_recorded(recipe: Recipe) -> str:
    """The setting that a graph cannot serve, or an empty string."""
    place, train, optim = recipe.place, recipe.train, recipe.optim
    if place.device == "cpu":
        return "place.device=cpu"
    if place.kind not in ("auto", *PLACEMENTS):
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
    """What the recipe wants of graphs; `auto` is off until it is decided."""
    return "on" if recipe.train.cuda_graphs is True and not cannot_be_recorded(recipe) else "off"


def waits_for_masks(scores: str) -> bool:
    """Whether attention with such scores (arch_types.py) waits for the host in each pass: where a
    fused kernel does not make them, transformers makes the mask, and looks at it.
    """
    return scores != "fused"


def is_recorded(recipe: Recipe, scores: str) -> bool:
    """Whether passes of a recipe with nothing `auto` are recorded, on a GPU."""
    return wish(recipe) == "on" and not waits_for_masks(scores)


def beside_graphs(name: str, moments: Moments, steps: Moments) -> dict[str, dict[str, int]]:
    """The moments of the phase called `name` where passes are recorded.

    `steps`: those of a step with gradients that are there throughout. The pool is a row of its own
    where nothing of it is in use.
    """
    update = steps[UPDATE]
    gradients, beside = update["gradients"], max(update["activation_workspace"], SPARE_BYTES)
    passes = {moment: extra for moment, extra in steps.items() if moment != UPDATE}
    if name == "steady step":
        return {
            moment: {
                **extra,
                "gradients": gradients,
                "activation_workspace": extra.get("activation_workspace", 0)
                + beside
                + STREAM_BYTES,
            }
            for moment, extra in passes.items()
        }
    if name not in ("evaluation", "save"):
        return {moment: {**extra} for moment, extra in moments.items()}
    pool = max(sum(extra.get(one, 0) for one in POOLED) for extra in passes.values())
    held = {"recorded": pool + STREAM_BYTES, "gradients": gradients}
    return {moment: {**extra, **held, **_hole(extra)} for moment, extra in moments.items()}


def _hole(extra: Mapping[str, int]) -> dict[str, int]:
    """A matrix that is larger than what a recording left free does not fit there, and is made
    behind it.
    """
    if extra.get("dequantised", 0) <= SPARE_BYTES:
        return {}
    return {"activation_workspace": extra.get("activation_workspace", 0) + SPARE_BYTES}
