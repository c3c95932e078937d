"""What every other choice would have cost: the plans that differ from a found one in one setting.

Each row of `choices.py` and each count, at each other value, planned on the same devices: its
speed, its bytes, and why it was not taken. Choices that change what is learnt are there too,
whether allowed or not, since what is forbidden may be what one wants to know. A count of resident
blocks that a neighbour brings in is the largest that fits, as `auto` would have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nibble.errors import ConfigError
from nibble.spec.advice import words_of
from nibble.spec.choices import (
    CHOICES,
    RANK,
    RESIDENT,
    Choice,
    Overrides,
    counts,
    differs,
    override,
    refusal_of,
)
from nibble.spec.config import Recipe
from nibble.spec.given import value_of
from nibble.spec.plan import Plan
from nibble.spec.planner import rate
from nibble.spec.search import Found
from nibble.spec.space import SAME, Space
from nibble.spec.units import show_bytes


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A plan that was not taken: what it changes, and why not. `plan` is None where there is none.

    `is_free`: whether the search might have taken it.
    """

    name: str
    overrides: Overrides
    plan: Plan | None
    why: str
    is_free: bool

    @property
    def words(self) -> str:
        """What it changes, as it would be typed."""
        return words_of(self.overrides)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        made = self.plan
        return {
            "choice": self.name,
            "overrides": self.overrides,
            "tokens_per_s": None if made is None or not made.speed else made.speed.tokens_per_s,
            "device_bytes": None if made is None else made.device_bytes,
            "host_bytes": None if made is None else made.host_bytes,
            "free": self.is_free,
            "why_not": self.why,
        }


def neighbours(found: Found) -> list[Neighbour]:
    """Every plan that differs from the found one in one choice, in the order of the table."""
    return list(_all(found))


def _all(found: Found) -> Iterator[Neighbour]:
    recipe = found.recipe.model_copy(update={"fit": found.started.fit})
    for choice in CHOICES:
        if not choice.searched:
            continue
        for values in choice.values(recipe, found.planner.setting):
            if differs(recipe, values):
                changed = {k: v for k, v in values.items() if value_of(recipe, k) != v}
                yield _neighbour(found, recipe, choice, changed)
    open_counts = _open_counts(found, recipe)
    for path, most in open_counts.items():
        here = value_of(recipe, path)
        for number in sorted({0, here - 1, here + 1, most} - {here}):
            if 0 <= number <= most:
                yield _neighbour(found, recipe, path, {path: number})


def _open_counts(found: Found, recipe: Recipe) -> dict[str, int]:
    bare = recipe.model_copy(update={"fit": None})
    return counts(bare, found.planner.setting)


def _neighbour(
    found: Found, recipe: Recipe, choice: Choice | str, overrides: Overrides
) -> Neighbour:
    name = choice if isinstance(choice, str) else choice.name
    word = None if isinstance(choice, str) else choice.allow
    changed = override(recipe, overrides)
    plain = recipe.model_copy(update={"fit": None})
    wrong = refusal_of(plain, changed)  # contradictions alone
    made = None if wrong else _planned(found, changed)
    if made is None and wrong is None:
        wrong = "this model cannot mean it"
    given = refusal_of(recipe, changed) if wrong is None else None
    allowed = () if recipe.fit is None else recipe.fit.allow
    forbidden = word is not None and word not in allowed
    if wrong is None and made is not None:
        wrong = _too_much(found, made)
        if wrong is None and given is not None:
            wrong = given
        elif wrong is None and forbidden:
            wrong = f"{_compared(found, made)}; needs fit.allow=[{word}]"
        elif wrong is None and word == RANK.allow:
            wrong = f"{_compared(found, made)}; only where nothing fits"
        elif wrong is None:
            wrong = _compared(found, made)
    return Neighbour(
        name=name,
        overrides=overrides,
        plan=made,
        why=wrong or "",
        is_free=made is not None and given is None and not forbidden and word != RANK.allow,
    )


def _planned(found: Found, recipe: Recipe) -> Plan | None:
    """The plan, with as many resident blocks as fit where it has come to stream."""
    planner = found.planner
    try:
        if RESIDENT in counts(recipe, planner.setting) and value_of(recipe, RESIDENT) == "auto":
            space = Space(started=recipe, planner=planner, budget=found.budget)
            bare = override(recipe, {RESIDENT: 0})
            most = planner.architecture.sizes.num_layers
            recipe = override(bare, {RESIDENT: space.largest(bare, RESIDENT, most) or 0})
        return planner(recipe)
    except ConfigError:
        return None


def _too_much(found: Found, made: Plan) -> str | None:
    device, host = found.budget.device_excess(made), found.budget.host_excess(made)
    parts = [f"card {show_bytes(device)} over"] if device else []
    parts += [f"host {show_bytes(host)} over"] if host else []
    return ", ".join(parts) or None


def _compared(found: Found, made: Plan) -> str:
    """In words: how much slower or faster, and where it is neither, what it takes."""
    share = rate(made) / rate(found.plan) - 1
    if abs(share) > SAME:
        return f"{abs(share):.1%} {'slower' if share < 0 else 'faster'}"
    more = made.device_bytes - found.plan.device_bytes
    if more > 0:
        return f"as fast, {show_bytes(more)} more"
    return f"as fast, {show_bytes(-more)} less" if more < 0 else "as fast"
