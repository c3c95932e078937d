"""What a parameter group may say, and what is refused before the first step.

Costs nothing. Ranges of the projection's own options are in spec/lowrank.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nibble.errors import ConfigError
from nibble.numerics.updates import BIAS_CORRECTIONS, RULES
from nibble.spec.lowrank import LOW_RANK_KEYS, LowRank, low_rank_of, matrix_shape
from nibble.spec.state import CODECS

GROUP_KEYS = {"params", "param_names", "name", "initial_lr"}
"""Keys of a group that are no option of the optimiser."""
IDLE = LowRank(rank=0)
"""The options of a projection as they are when nobody gives them."""


def check_group(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key we do not know, a value outside its range or an idle option."""
    unknown = sorted(set(group) - set(defaults) - GROUP_KEYS)
    if unknown:
        raise ConfigError(
            f"unknown parameter-group keys {', '.join(unknown)}: use {', '.join(defaults)}"
        )
    values = {**defaults, **group}
    words: tuple[tuple[str, str, Iterable[str]], ...] = (
        ("update rule", values["rule"], RULES),
        ("codec", values["codec"], CODECS),
        ("bias_correction", values["bias_correction"], BIAS_CORRECTIONS),
    )
    for what, word, allowed in words:
        if word not in allowed:
            raise ConfigError(f"unknown {what} {word!r}: use one of {', '.join(allowed)}")
    for key in ("lr", "eps", "weight_decay", "parameter_scale"):
        if not values[key] >= 0:
            raise ConfigError(f"{key}={values[key]} is out of range: give a number >= 0")
    shares = {"momentum": values["momentum"]}
    shares |= {f"betas[{place}]": beta for place, beta in enumerate(values["betas"])}
    for key, share in shares.items():
        if not 0 <= share < 1:
            raise ConfigError(f"{key}={share} is out of range: give a number in [0, 1)")
    if values["parameter_scale"] > 0 and RULES[values["rule"]].elementwise:
        raise ConfigError(
            f"parameter_scale={values['parameter_scale']} has no meaning for rule "
            f"{values['rule']!r}: use it with adafactor, or leave it out"
        )
    _check_low_rank(group, values)


def _check_low_rank(group: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise ConfigError for options of a projection that are wrong or change nothing."""
    low_rank = low_rank_of(values)
    if low_rank is None:
        idle = [key for key in LOW_RANK_KEYS if key != "rank" and key in group]
        if idle:
            raise ConfigError(
                f"{', '.join(idle)} have no effect without a rank: give the group a rank >= 1 "
                "or leave them out"
            )
        return
    low_rank.check()
    if not low_rank.can_grow and "norm_growth" in group:
        raise ConfigError(
            f"norm_growth={low_rank.norm_growth} has no effect: residual "
            f"{low_rank.residual!r} is not limited; leave it out"
        )


def check_constructor(defaults: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise ConfigError where the constructor was told of a projection that no group makes."""
    idle = [key for key in LOW_RANK_KEYS if key != "rank" and defaults[key] != getattr(IDLE, key)]
    if idle and all(group["rank"] == 0 for group in groups):
        raise ConfigError(
            f"{', '.join(idle)} have no effect without a rank: give a rank >= 1 or leave them out"
        )


def check_projects(low_rank: LowRank, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise ConfigError where a rank is above every matrix of a group, given by whole shapes."""
    if shapes and not any(low_rank.projects(shape) for shape in shapes):
        sides = [min(matrix_shape(shape)) for shape in shapes if len(shape) >= 2]
        found = f"its largest matrix has a side of {max(sides)}" if sides else "it has no matrix"
        raise ConfigError(
            f"rank={low_rank.rank} projects nothing in this parameter group: {found}; "
            "lower the rank or drop it"
        )
