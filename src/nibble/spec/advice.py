"""What would make a plan fit: small changes of the recipe, each planned again.

Idea. A table of changes, from those that cost only time to those that change what is learnt. Each
is tried alone; the ones that fit are named with their new peak. When none fits alone they are piled
up in the order of the table until one does, and those that turn out not to be needed are taken off
again.

It only rewrites recipes; what a change is worth is `plan.py`'s arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nibble.errors import ConfigError
from nibble.spec.config import Recipe

if TYPE_CHECKING:
    from nibble.spec.plan import Plan

MAX_NAMED = 3
Overrides = dict[str, Any]
Change = Callable[[Recipe], Iterator[Overrides]]


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A recipe that fits: the words to add to the command line and its peak."""

    overrides: Overrides
    bytes: int

    @property
    def words(self) -> str:
        """`key=value key=value`."""
        shown = {key: "null" if value is None else value for key, value in self.overrides.items()}
        return " ".join(f"{key}={value}" for key, value in shown.items())


def advise(plan: Plan, limit_bytes: int) -> list[Advice]:
    """The changes that would fit into `limit_bytes`, gentlest first; empty if none does."""
    single = [found for change in CHANGES if (found := _first_fit(plan, {}, change, limit_bytes))]
    if single:
        return single[:MAX_NAMED]
    pile: Overrides = {}
    for change in CHANGES:
        found = _first_fit(plan, pile, change, limit_bytes)
        if found is not None:
            return [_lightened(plan, found, limit_bytes)]
        last = list(change(apply(plan.recipe, pile)))
        if last:
            pile = {**pile, **last[-1]}
    return []


def apply(recipe: Recipe, overrides: Overrides) -> Recipe:
    """The recipe with `section.key` values replaced and validated again."""
    sections: dict[str, dict[str, Any]] = {}
    for path, value in overrides.items():
        section, _, key = path.partition(".")
        sections.setdefault(section, {})[key] = value
    values = recipe.model_dump()
    for section, given in sections.items():
        values[section].update(given)
    return Recipe.model_validate(values)


def _lightened(plan: Plan, advice: Advice, limit_bytes: int) -> Advice:
    """The advice without the overrides that it does not need, the costliest taken off first."""
    pairs = ("train.micro_batch_size", "train.gradient_accumulation_steps")
    for key in [k for k in reversed(advice.overrides) if k != pairs[1]]:
        without = {
            k: v
            for k, v in advice.overrides.items()
            if k != key and not (key == pairs[0] and k == pairs[1])
        }
        lighter = _planned(plan, without, limit_bytes)
        advice = lighter or advice
    return advice


def _planned(plan: Plan, overrides: Overrides, limit_bytes: int) -> Advice | None:
    """The plan with these overrides, if it fits."""
    from nibble.spec.plan import plan as plan_again

    try:
        other = plan_again(
            apply(plan.recipe, overrides),
            architecture=plan.source,
            hardware=plan.hardware,
            on_cpu=plan.on_cpu,
            devices=plan.devices,
        )
    except ConfigError:
        return None  # a change that this model cannot take
    if not other.fits(limit_bytes):
        return None
    needed = other.host_bytes if other.on_cpu else other.device_bytes
    return Advice(overrides=overrides, bytes=needed)


def _first_fit(plan: Plan, pile: Overrides, change: Change, limit_bytes: int) -> Advice | None:
    """The first step of a change, on top of `pile`, that fits."""
    for overrides in change(apply(plan.recipe, pile)):
        found = _planned(plan, {**pile, **overrides}, limit_bytes)
        if found is not None:
            return found
    return None


def _checkpointing(recipe: Recipe) -> Iterator[Overrides]:
    if recipe.train.activation_checkpointing == "none":
        yield {"train.activation_checkpointing": "full"}


def _micro_batch(recipe: Recipe) -> Iterator[Overrides]:
    """Halve the rows of a pass and double the passes: the same update, more launches."""
    rows, passes = recipe.train.micro_batch_size, recipe.train.gradient_accumulation_steps
    while rows > 1 and rows % 2 == 0:
        rows, passes = rows // 2, passes * 2
        yield {"train.micro_batch_size": rows, "train.gradient_accumulation_steps": passes}
    if rows > 1:
        yield {
            "train.micro_batch_size": 1,
            "train.gradient_accumulation_steps": passes * rows,
        }


def _loss_chunk(recipe: Recipe) -> Iterator[Overrides]:
    chunk = recipe.train.loss_chunk_tokens
    while chunk > 256:
        chunk //= 2
        yield {"train.loss_chunk_tokens": max(chunk, 256)}


def _optimizer(recipe: Recipe) -> Iterator[Overrides]:
    if recipe.optim.name == "adamw":
        yield {"optim.name": "adamw8bit"}


def _format(recipe: Recipe) -> Iterator[Overrides]:
    if recipe.adapter.kind != "none" and recipe.quant.format in ("none", "int8"):
        idle = {} if recipe.quant.int8_threshold is None else {"quant.int8_threshold": None}
        yield {"quant.format": "nf4", **idle}


def _length(recipe: Recipe) -> Iterator[Overrides]:
    length = recipe.data.max_length
    while length > 256:
        length //= 2
        yield {"data.max_length": max(length, 256)}


def _adapter(recipe: Recipe) -> Iterator[Overrides]:
    if recipe.adapter.kind == "none":
        yield {"adapter.kind": "lora"}
        yield {"adapter.kind": "lora", "quant.format": "nf4"}


CHANGES: tuple[Change, ...] = (
    _checkpointing,
    _micro_batch,
    _loss_chunk,
    _optimizer,
    _format,
    _length,
    _adapter,
)
"""In the order in which they are proposed: time first, then precision, then what is learnt."""
