"""What a recipe's optimiser does to which parameter: published methods in words, and who is left
out.

    explicit setting  >  the method's row (`lowrank.METHODS`)  >  the default

A recipe that names a method or a rank projects the gradients of matrices (spec/lowrank.py). Some
parameters are left to the plain rule, each for one of four reasons (`why_whole`): vectors have no
rank; a row of an embedding or head is learnt only where its token stands, so few directions serve
all tokens badly; the recipe's targets may name others; and a matrix with a side below the rank has
nothing to gain.

The planner and the optimiser ask the same functions. Costs nothing: words and integers only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from nibble.errors import ConfigError
from nibble.spec.config import Optim
from nibble.spec.lowrank import LOW_RANK_KEYS, METHODS, LowRank, matrix_shape
from nibble.spec.names import lineage, meets

DEFAULT_RANK = 128
"""Of a method that is named without a rank."""
ALL_MATRICES = "all-linear"
EMBEDDINGS = r"(^|[._])(embed|wte|wpe|word_embeddings|lm_head|embed_out|score|classifier)"
"""Names of embeddings and heads."""
BIASES = r"(^|[._])bias$"
"""By name, since the biases of stacked experts have two dims."""
VECTOR, EMBEDDING, NO_TARGET, SMALL = (
    "vectors and biases",
    "embeddings and heads",
    "no target",
    "a side below the rank",
)
"""Why a parameter is not projected."""

# Words of a recipe -> options of the optimiser.
WORDS = {
    "rank": "rank",
    "refresh_every": "update_proj_gap",
    "scale": "scale",
    "side": "proj_type",
    "basis": "basis",
    "basis_storage": "basis_storage",
    "residual": "residual",
    "norm_growth": "norm_growth",
    "stagger": "stagger",
    "lazy_threshold": "lazy_threshold",
}
_UNNAMED = {"basis": "randomised"}
"""What a rank without a method means."""


def is_low_rank(optim: Optim) -> bool:
    """Whether the recipe projects gradients at all."""
    return optim.method != "none" or optim.rank is not None


def low_rank(optim: Optim) -> LowRank | None:
    """The projection that a recipe's `optim` means; None for the plain rule.

    Layer-wise mode cannot take an SVD, so there a method's svd is the randomised basis, unless the
    recipe says svd itself, which is refused (spec/contradictions.py).
    """
    if not is_low_rank(optim):
        return None
    row = _UNNAMED if optim.method == "none" else METHODS[optim.method]
    values: dict[str, Any] = {"rank": DEFAULT_RANK}
    values |= {key: value for key, value in row.items() if key in LOW_RANK_KEYS}
    if optim.layerwise and values.get("basis") == "svd":
        values["basis"] = "randomised"
    for word, key in WORDS.items():
        given = getattr(optim, word)
        if given is not None:
            values[key] = given
    return LowRank(**values)


def group_values(low: LowRank) -> dict[str, Any]:
    """The projection as keys of a parameter group; those without effect are left out."""
    idle = set() if low.can_grow else {"norm_growth"}
    return {key: getattr(low, key) for key in LOW_RANK_KEYS if key not in idle}


def has_int8_weights(optim: Optim) -> bool:
    """Whether projected weights are kept in 8 bits."""
    return is_low_rank(optim) and optim.weights == "int8"


def why_whole(
    name: str, shape: tuple[int, ...], *, low: LowRank, targets: Iterable[str]
) -> str | None:
    """Why the parameter follows the plain rule; None if it is projected."""
    if len(shape) < 2 or re.search(BIASES, name):
        return VECTOR
    chosen = tuple(targets)
    named = any(target != ALL_MATRICES and means(target, name) for target in chosen)
    if not named and (ALL_MATRICES not in chosen):
        return NO_TARGET
    if not named and re.search(EMBEDDINGS, name):
        return EMBEDDING
    return None if low.projects(shape) else SMALL


def means(target: str, name: str) -> bool:
    """Whether a target names the parameter: by its own name, its module's or that of a module that
    contains it."""
    return any(meets(target, part) for part in lineage(name))


def reasons(
    optim: Optim, shapes: Mapping[str, tuple[int, ...]], *, low: LowRank
) -> dict[str, str | None]:
    """`why_whole` of every trained parameter, by name.

    Raises ConfigError for a target that means no matrix and for a rank above every matrix.
    """
    matrices = [name for name, shape in shapes.items() if len(shape) >= 2]
    for target in optim.targets:
        if target != ALL_MATRICES and not any(means(target, name) for name in matrices):
            leaves = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in matrices})
            raise ConfigError(
                f"optim.targets: {target!r} names no trained matrix; there are {', '.join(leaves)}"
            )
    found = {
        name: why_whole(name, shape, low=low, targets=optim.targets)
        for name, shape in shapes.items()
    }
    if None not in found.values():
        sides = [min(matrix_shape(shapes[name])) for name, why in found.items() if why == SMALL]
        largest = (
            f"the largest of the matrices chosen has a side of {max(sides)}"
            if sides
            else "no matrix is chosen"
        )
        raise ConfigError(
            f"optim.rank={low.rank} projects nothing: {largest}; lower the rank, or choose others "
            "in optim.targets"
        )
    return found
