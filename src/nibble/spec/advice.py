"""What would make a plan fit: small changes of the recipe, each planned again.

Idea. The rows of `choices.py`, from those that cost only time to those that change what is learnt.
Each is tried alone; the ones that fit are named with their new peak. When none fits alone they are
piled up in the order of the table until one does, and those that turn out not to be needed are
taken off again. Rows that a search also has are the same rows, so what is advised can be found.

It only rewrites recipes; what a change is worth is `plan.py`'s arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nibble.errors import ConfigError
from nibble.spec.choices import (
    CHOICES,
    Choice,
    Overrides,
    Setting,
    differs,
    override,
    refusal_of,
)
from nibble.spec.config import Recipe
from nibble.spec.given import value_of
from nibble.spec.units import parse_bytes

if TYPE_CHECKING:
    from nibble.spec.plan import Plan

MAX_NAMED = 5
Pile = list[Overrides]


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A recipe that fits: the words to add to the command line and its peak."""

    overrides: Overrides
    bytes: int

    @property
    def words(self) -> str:
        """`key=value key=value`."""
        return words_of(self.overrides)


def words_of(overrides: Overrides) -> str:
    """Settings as they are typed after a command."""
    shown = {
        key: "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        for key, value in overrides.items()
    }
    return " ".join(f"{key}={value}" for key, value in shown.items())


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What advice has to fit into: bytes of a device (None: the plan's own limit), of the host."""

    device_bytes: int | None = None
    host_bytes: int | None = None

    def hold(self, plan: Plan) -> bool:
        """Whether a plan is within both, and within the host memory that its recipe names."""
        ram = plan.recipe.place.ram
        hosts = [self.host_bytes, None if ram is None else parse_bytes(ram)]
        return plan.fits(self.device_bytes) and all(
            limit is None or plan.host_bytes <= limit for limit in hosts
        )


def advise(plan: Plan, limit_bytes: int) -> list[Advice]:
    """The changes that would fit into `limit_bytes`, gentlest first; empty if none does."""
    return _advise(plan, Limits(device_bytes=limit_bytes))


def advise_host(plan: Plan, host_bytes: int) -> list[Advice]:
    """The changes that would fit into so much host memory, and still into the devices."""
    return _advise(plan, Limits(host_bytes=host_bytes))


def _advise(plan: Plan, limits: Limits) -> list[Advice]:
    single = [found for choice in CHOICES if (found := _first_fit(plan, [], choice, limits))]
    if single:
        return single[:MAX_NAMED]
    pile: Pile = []
    for choice in CHOICES:
        found = _first_fit(plan, pile, choice, limits)
        if found is not None:
            return [_lightened(plan, [*pile, _last(found, pile, plan)], found, limits)]
        last = list(_steps(plan, apply(plan.recipe, _merged(pile)), choice))
        if last:
            pile.append(last[-1])
    return []


def apply(recipe: Recipe, overrides: Overrides) -> Recipe:
    """The recipe with `section.key` values replaced and validated again."""
    return Recipe.model_validate(override(recipe, overrides).model_dump())


def _merged(pile: Pile) -> Overrides:
    return {key: value for overrides in pile for key, value in overrides.items()}


def _last(found: Advice, pile: Pile, plan: Plan) -> Overrides:
    """What the last change adds to the pile beneath it, also where it takes something back."""
    beneath = _merged(pile)
    whole = {key: value_of(plan.recipe, key) for key in beneath} | found.overrides
    return {k: v for k, v in whole.items() if k not in beneath or beneath[k] != v}


def _steps(plan: Plan, recipe: Recipe, choice: Choice) -> Iterator[Overrides]:
    """The legal values of a choice beside what the recipe has: only what they change."""
    setting = Setting(architecture=plan.source, devices=plan.devices, on_cpu=plan.on_cpu)
    for values in choice.values(recipe, setting):
        if differs(recipe, values) and refusal_of(recipe, override(recipe, values)) is None:
            yield {k: v for k, v in values.items() if value_of(recipe, k) != v}


def _lightened(plan: Plan, pile: Pile, advice: Advice, limits: Limits) -> Advice:
    """The advice without the changes that it does not need, the costliest taken off first."""
    for index in reversed(range(len(pile) - 1)):
        without = [*pile[:index], *pile[index + 1 :]]
        lighter = _planned(plan, _merged(without), limits)
        if lighter is not None:
            pile, advice = without, lighter
    return advice


def _planned(plan: Plan, overrides: Overrides, limits: Limits) -> Advice | None:
    """The plan with these overrides, if it fits."""
    from nibble.spec.plan import plan as plan_again

    overrides = {k: v for k, v in overrides.items() if value_of(plan.recipe, k) != v}
    recipe = override(plan.recipe, overrides)
    if refusal_of(plan.recipe, recipe) is not None:
        return None
    try:
        other = plan_again(
            recipe,
            architecture=plan.source,
            hardware=plan.hardware,
            on_cpu=plan.on_cpu,
            devices=plan.devices,
        )
    except ConfigError:
        return None  # a change that this model cannot take
    if not limits.hold(other):
        return None
    of_host = other.on_cpu or limits.host_bytes is not None
    needed = other.host_bytes if of_host else other.device_bytes
    return Advice(overrides=overrides, bytes=needed)


def _first_fit(plan: Plan, pile: Pile, choice: Choice, limits: Limits) -> Advice | None:
    """The first value of a choice, on top of the pile, that fits."""
    beneath = _merged(pile)
    for overrides in _steps(plan, override(plan.recipe, beneath), choice):
        found = _planned(plan, {**beneath, **overrides}, limits)
        if found is not None:
            return found
    return None
