"""What `fit: auto` may choose, and what somebody has said already.

    always        where tensors live, how rows are split into passes, what is kept of activations
    if allowed    the format of the base, 8-bit states, low-rank gradients, a lower rank
    never         everything else, and whatever a person gave

A recipe is validated once and then travels, as JSON to other processes and as YAML to the run
folder, where nobody can tell a given value from a default any more. So what was given is written
down in `fit.fixed` when it is read. Values of a built-in recipe are its defaults, not somebody's
wish; `auto` is an invitation to choose. No arithmetic here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nibble.errors import ConfigError

from . import schema
from .config import Recipe
from .texts import nearest

ALWAYS = (
    "place.kind",
    "place.shard",
    "place.resident_blocks",
    "train.micro_batch_size",
    "train.gradient_accumulation_steps",
    "train.activation_checkpointing",
    "train.keep_blocks",
    "train.activation_offload",
    "train.mlp_tile_tokens",
    "train.loss_chunk_tokens",
)
"""Settings that move memory and time and leave what is learnt alone."""
ALLOWED: dict[str, tuple[str, ...]] = {
    "format": ("quant.format",),
    "optimizer": ("optim.name", "optim.state"),
    "method": ("optim.method", "optim.layerwise", "optim.basis_storage"),
    "rank": ("adapter.rank", "adapter.alpha", "optim.rank"),
}
"""Words of `fit.allow` and the settings that they free, also those that were given."""
BESIDE = (
    "quant.bits",
    "quant.block",
    "quant.double_quant",
    "quant.int8_threshold",
    "quant.kernels",
    "place.shard_group",
    "place.zero_stage",
    "place.ring_blocks",
)
"""Settings that are not chosen, and that a choice beside them must not make idle."""
OPEN = ("auto",)
"""Values that ask to be chosen."""


def fixing(recipe: Recipe, given: Iterable[str]) -> Recipe:
    """The recipe with what was given added to `fit.fixed`; as it is where nothing is to be chosen.

    `given`: dotted paths. Raises ConfigError for a path in `fit.fixed` that is no setting.
    """
    if recipe.fit is None:
        return recipe
    known = schema.fields()
    for path in recipe.fit.fixed:
        if path not in known:
            near = nearest(path, list(known))
            hint = f": did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"fit.fixed: {path} is no setting{hint}")
    free = {path for word in recipe.fit.allow for path in ALLOWED[word]}
    watched = {*ALWAYS, *BESIDE, *(path for paths in ALLOWED.values() for path in paths)}
    found = {path for path in given if path in watched and value_of(recipe, path) not in OPEN}
    fixed = sorted({*recipe.fit.fixed, *found} - free)
    return recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"fixed": tuple(fixed)})})


def value_of(recipe: Recipe, path: str) -> Any:
    """The value of a setting of a section, by its dotted path."""
    section, _, key = path.partition(".")
    return getattr(getattr(recipe, section), key)
