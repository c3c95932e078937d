"""`fit: auto`: the fastest plan within the memory, found among all that the recipe leaves open.

    maximise  tokens/s of all devices     where  device <= its budget  and  host <= its budget

The space is the product of the rows of `choices.py`, gone through by `space.py`. Estimates differ
by less than they are worth: plans within a thousandth of the fastest count as equally fast, and the
one that changes the fewest settings of the recipe is taken, of those the smallest. The rank, where
it may be lowered, is the largest for which anything fits.

Costs some hundred plans, each under a millisecond. Where the card's speed is not known, the fewest
FLOPs a token count as the fastest. No formula of memory or time is known here: `plan.py` has them.
"""

from __future__ import annotations

from dataclasses import dataclass

from nibble.errors import ConfigError, PlanError
from nibble.spec.arch import Architecture
from nibble.spec.choices import (
    CHOICES,
    KEEP,
    RANK,
    RESIDENT,
    Overrides,
    counts,
    differs,
    fixed_paths,
    is_free,
    override,
    refusal_of,
    rows_per_device,
)
from nibble.spec.config import Recipe
from nibble.spec.given import ALLOWED, ALWAYS, value_of
from nibble.spec.hardware import Hardware
from nibble.spec.holdings import ONE_DEVICE, Devices, placement_kind
from nibble.spec.load import recipe_dict
from nibble.spec.plan import Plan
from nibble.spec.planner import Budget, Planner
from nibble.spec.space import Space
from nibble.spec.units import show_bytes


@dataclass(frozen=True, kw_only=True)
class Found:
    """The fastest plan: `recipe` has its settings and no `fit`, `started` those it began with."""

    recipe: Recipe
    plan: Plan
    started: Recipe
    budget: Budget
    planner: Planner

    @property
    def changes(self) -> Overrides:
        """The settings that were chosen otherwise than the recipe has them."""
        paths = [path for choice in CHOICES for path in choice.paths]
        return {
            path: value_of(self.recipe, path)
            for path in paths
            if value_of(self.recipe, path) not in (value_of(self.started, path), "auto")
        }


def search(
    recipe: Recipe,
    *,
    architecture: Architecture,
    hardware: Hardware | None = None,
    on_cpu: bool = False,
    devices: Devices = ONE_DEVICE,
    budget: Budget,
) -> Found:
    """The fastest recipe within the budget among those that `recipe.fit` leaves open.

    Raises ConfigError where nothing is left to choose or the rows cannot be shared out, PlanError
    where nothing fits, with the smallest that would.
    """
    planner = Planner(architecture=architecture, hardware=hardware, on_cpu=on_cpu, devices=devices)
    started = starting(recipe, devices)
    _check_open(started, planner)
    ranks = [started]
    if is_free(started, RANK):
        legal = (override(started, values) for values in RANK.values(started, planner.setting))
        ranks = [lower for lower in legal if refusal_of(started, lower) is None] or ranks
    for ranked in ranks:
        made = Space(started=ranked, planner=planner, budget=budget).fastest()
        if made is not None:
            return Found(
                recipe=settled(made.recipe, devices),
                plan=made,
                started=started,
                budget=budget,
                planner=planner,
            )
    raise PlanError(_too_small(ranks[-1], planner, budget))


def starting(recipe: Recipe, devices: Devices) -> Recipe:
    """The recipe that a search begins with: rows of the update shared out, counts at 0.

    Raises ConfigError for rows that contradict what is given, or do not divide.
    """
    made = recipe
    rows = None if recipe.fit is None else recipe.fit.batch_rows
    if rows is not None:
        made = override(made, _shared_rows(recipe, rows, devices))
    zero = {KEEP: made.train.keep_blocks, RESIDENT: made.place.resident_blocks}
    return override(made, {path: 0 for path in zero if path not in fixed_paths(recipe)})


def _shared_rows(recipe: Recipe, rows: int, devices: Devices) -> Overrides:
    micro, passes = "train.micro_batch_size", "train.gradient_accumulation_steps"
    own, beside = divmod(rows, devices.total)
    if beside:
        raise ConfigError(
            f"fit.batch_rows={rows} does not divide by {devices.total} devices: take "
            f"{max(1, own) * devices.total} or {(own + 1) * devices.total}"
        )
    given = [path for path in (micro, passes) if path in fixed_paths(recipe)]
    if len(given) == 2 and rows_per_device(recipe) != own:
        raise ConfigError(
            f"fit.batch_rows={rows}, but {micro} and {passes} that you gave make "
            f"{rows_per_device(recipe) * devices.total} on {devices.total} devices: leave one out"
        )
    if not given:
        return {micro: 1, passes: own}
    number = int(value_of(recipe, given[0]))
    if own % number:
        raise ConfigError(
            f"fit.batch_rows={rows} leaves {own} rows for each of {devices.total} devices, which "
            f"{given[0]}={number} does not divide: change either"
        )
    other = passes if given[0] == micro else micro
    return {} if len(given) == 2 else {other: own // number}


def settled(recipe: Recipe, devices: Devices) -> Recipe:
    """The found recipe without `fit`, its placement and devices in so many words, idle settings at
    their defaults: the one that is written, and trained."""
    kind = placement_kind(recipe.place, devices.total)
    place = {"place.kind": kind}
    named = override(recipe, place).model_copy(update={"fit": None})
    if kind != "single" and not recipe.place.num_devices:
        named = override(named, {"place.num_devices": devices.per_machine})
    return Recipe.model_validate(recipe_dict(named))


def _check_open(recipe: Recipe, planner: Planner) -> None:
    """Raise ConfigError where every choice has one legal value, and no count is free."""
    setting = planner.setting
    if counts(recipe, setting):
        return
    for choice in CHOICES:
        if is_free(recipe, choice):
            for values in choice.values(recipe, setting):
                changed = override(recipe, values)
                if differs(recipe, values) and refusal_of(recipe, changed) is None:
                    return
    given = ", ".join(path for path in ALWAYS if path in fixed_paths(recipe))
    raise ConfigError(
        f"fit has nothing to choose: you gave {given or 'all that there is'}; leave one of them "
        "out, allow more with fit.allow, or remove fit"
    )


def _too_small(recipe: Recipe, planner: Planner, budget: Budget) -> str:
    """What to say when nothing fits: the smallest that there is, and what would make it smaller."""
    least = smallest(recipe, planner, budget)
    text = f"nothing fits into {budget.words()}"
    if least is None:
        return f"{text}: no combination of what is left open can be trained"
    needed = f"{show_bytes(least.device_bytes)} of each card" if not least.on_cpu else ""
    host = f"{show_bytes(least.host_bytes)} of the host"
    needed = " and ".join(part for part in (needed, host) if part)
    more = []
    assert recipe.fit is not None
    for word in ALLOWED:
        if word not in recipe.fit.allow:
            fit = recipe.fit.model_copy(update={"allow": (*recipe.fit.allow, word)})
            free = set(fit.fixed) - set(ALLOWED[word])
            fit = fit.model_copy(update={"fixed": tuple(sorted(free))})
            other = smallest(recipe.model_copy(update={"fit": fit}), planner, budget)
            if other is not None and budget.fits(other):
                more.append(word)
    hint = (
        f"allow more with fit.allow=[{more[0]}]" + "".join(f" or [{word}]" for word in more[1:])
        if more
        else "lower data.max_length, or take a smaller model or a larger card"
    )
    return f"{text}: the smallest plan takes {needed}; {hint}"


def smallest(recipe: Recipe, planner: Planner, budget: Budget) -> Plan | None:
    """The plan that is nearest to the budget."""
    lower = list(RANK.values(recipe, planner.setting)) if is_free(recipe, RANK) else []
    recipe = override(recipe, lower[-1]) if lower else recipe
    space = Space(started=recipe, planner=planner, budget=budget)
    plans = [planner(corner) for core in space.cores() for corner in space.corners(core)]
    return min(
        plans,
        key=lambda made: (
            budget.host_excess(made) + budget.device_excess(made),
            made.device_bytes,
            made.host_bytes,
        ),
        default=None,
    )
