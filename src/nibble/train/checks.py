"""What can be refused once the data are counted and before weights are read.

Costs nothing: lengths and words.
"""

from __future__ import annotations

from nibble.data import Splits
from nibble.errors import ConfigError
from nibble.optim.schedules import factor, num_warmup_steps
from nibble.spec.config import Recipe
from nibble.use.assemble import Assembly


def check_positions(assembly: Assembly, splits: Splits) -> None:
    """Raise ConfigError for rows that are longer than a table of positions."""
    family = assembly.built.family
    parts = [splits.train, *([splits.eval] if splits.eval is not None else [])]
    longest = max((int(rows.lengths.max()) for rows in parts if len(rows)), default=0)
    if splits.stream is not None:
        longest = splits.stream.max_length
    limit = family.max_positions
    if family.has_position_limit and limit is not None and longest > limit:
        raise ConfigError(
            f"data.max_length={assembly.recipe.data.max_length} leaves a row of {longest} tokens, "
            f"but {family.model_type} has {limit} positions: set data.max_length={limit}"
        )


def check_schedule(recipe: Recipe, max_steps: int) -> None:
    """Raise ConfigError for a warm-up longer than the run, before weights are read."""
    words = recipe.optim
    warmup_steps = num_warmup_steps(
        total_steps=max_steps, warmup_steps=words.warmup_steps, warmup_ratio=words.warmup_ratio
    )
    factor(
        0,
        total_steps=max_steps,
        warmup_steps=warmup_steps,
        floor_ratio=words.floor_ratio,
        name=words.schedule,
    )
