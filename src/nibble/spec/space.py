"""All combinations of what a recipe leaves open, and the fastest of them that fits.

Memory and speed both grow with the two counts (blocks that keep their activations, blocks that stay
on the device), so of these only the edge of what fits matters: it is found by halving, and with
both counts open by branch and bound along that edge, since the corner of a stretch bounds its
speed. Combinations are taken fastest bound first until the bounds are below what has been reached.
Choices that only save memory are spread out last, around the combinations that are fast enough.

What there is to choose is `choices.py`, what it costs `plan.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nibble.errors import ConfigError
from nibble.spec.choices import (
    CHOICES,
    KEEP,
    RANK,
    RESIDENT,
    Choice,
    counts,
    differs,
    fixed_paths,
    is_free,
    override,
    present,
    refusal_of,
)
from nibble.spec.config import Recipe
from nibble.spec.given import value_of
from nibble.spec.plan import Plan
from nibble.spec.planner import Budget, Planner, rate

SAME = 1e-3
"""Of the speed, within which two plans are equally fast."""


@dataclass(kw_only=True)
class Space:
    """The combinations of all choices around one recipe."""

    started: Recipe
    planner: Planner
    budget: Budget

    def fastest(self) -> Plan | None:
        """The fastest plan that fits, of equally fast ones the one nearest to the recipe."""
        cores, best = [], 0.0
        for recipe in self.cores():
            corners = [c for c in self.corners(recipe) if self.fits_low(self.made(c))]
            if corners:
                bound = rate(self.made(override(recipe, counts(recipe, self.planner.setting))))
                cores.append((bound, recipe, corners))
                here = [rate(m) for c in corners if self.budget.fits(m := self.made(c))]
                best = max([best, *here])
        reached = []
        for bound, recipe, corners in sorted(cores, key=lambda core: -core[0]):
            if bound < best * (1 - SAME):
                break
            reach = max(self.reach(corner, best * (1 - SAME)) for corner in corners)
            best = max(best, reach)
            reached.append((reach, recipe))
        near = [recipe for reach, recipe in reached if reach and reach >= best * (1 - SAME)]
        return self.nearest(near, best * (1 - SAME))

    def nearest(self, cores: Sequence[Recipe], least: float) -> Plan | None:
        """Of the plans of these cores that reach a rate the first by `order`."""
        found: Plan | None = None
        for core in sorted(cores, key=self.num_changes):
            for recipe in sorted(self.savings(core), key=self.num_changes):
                if found is not None and self.num_changes(recipe) > self.order(found)[0]:
                    break
                if self.fits_low(self.made(recipe)):
                    made = self.edge(recipe, least)
                    if made is not None and rate(made) >= least:
                        found = min(
                            [one for one in (found, self.shrunk(made, least)) if one is not None],
                            key=self.order,
                        )
        return found

    def order(self, made: Plan) -> tuple[int, int, int]:
        """Of equally fast plans: the fewest changes, the least device and host memory."""
        return self.num_changes(made.recipe), made.device_bytes, made.host_bytes

    def num_changes(self, recipe: Recipe) -> int:
        """Choices made otherwise than in the recipe; blocks that stay on the device are none."""
        number = sum(
            is_free(self.started, choice) and differs(self.started, present(recipe, choice))
            for choice in CHOICES
        )
        return number + (recipe.train.keep_blocks != self.started.train.keep_blocks)

    def made(self, recipe: Recipe) -> Plan:
        return self.planner(recipe)

    def fits_low(self, made: Plan) -> bool:
        """Whether it fits where more of a count takes more."""
        return (self.budget.fits if made.on_cpu else self._fits_device)(made)

    def _fits_device(self, made: Plan) -> bool:
        return self.budget.device_excess(made) == 0

    def cores(self) -> Iterator[Recipe]:
        """Legal combinations of the choices that are not merely savings, counts at 0."""
        free = [c for c in CHOICES if is_free(self.started, c) and not c.saves and c is not RANK]
        for recipe in self._combinations(self.started, free):
            if refusal_of(self.started, recipe) is None:
                try:
                    self.made(recipe)
                except ConfigError:
                    continue  # words that this model cannot mean
                yield recipe

    def savings(self, recipe: Recipe) -> list[Recipe]:
        """A core with each combination of savings, gentlest first."""
        saving = [choice for choice in CHOICES if is_free(recipe, choice) and choice.saves]
        return [
            saved
            for saved in self._combinations(recipe, saving)
            if refusal_of(self.started, saved) is None
        ]

    def corners(self, recipe: Recipe) -> list[Recipe]:
        """A core with the savings that save most, in tiles or not: small tiles may not pay."""
        all_of_them = self.savings(recipe)
        least = min(r.train.loss_chunk_tokens for r in all_of_them)
        ends = [r for r in all_of_them if r.train.loss_chunk_tokens == least]
        return [ends[0], ends[-1]] if len(ends) > 1 else ends

    def _combinations(self, recipe: Recipe, choices: Sequence[Choice]) -> Iterator[Recipe]:
        if not choices:
            yield recipe
            return
        fixed = fixed_paths(recipe)
        for values in choices[0].values(recipe, self.planner.setting):
            if not any(p in fixed and value_of(recipe, p) != v for p, v in values.items()):
                yield from self._combinations(override(recipe, values), choices[1:])

    def reach(self, recipe: Recipe, least: float) -> float:
        """The best rate at the edge of what fits; 0 where that is below `least`, or the host is
        too small."""
        made = self.edge(recipe, least)
        return 0.0 if made is None else rate(made)

    def edge(self, recipe: Recipe, least: float) -> Plan | None:
        """The fastest plan over the counts; `recipe` has them at 0, and fits the device. None where
        all are slower than `least`."""
        most = counts(recipe, self.planner.setting)
        tops: dict[str, int] = {}
        for path, number in most.items():
            beside = {other: top for other, top in most.items() if other != path}
            top = self.largest(recipe, path, number, beside=beside, least=least)
            if top is None:
                return None
            tops[path] = top
        if len(tops) < 2:
            made = self.made(override(recipe, tops))
            return made if self.budget.fits(made) else None
        return self._along(recipe, tops, least)

    def largest(
        self,
        recipe: Recipe,
        path: str,
        most: int,
        *,
        low: int = 0,
        beside: Mapping[str, int] | None = None,
        least: float = 0.0,
    ) -> int | None:
        """The largest count that fits, `low` being known to; None when, with the other counts as
        in `beside`, not even one more would reach `least`."""
        high = most
        if self.fits_low(self.made(override(recipe, {path: high}))):
            return high
        while low < high:
            middle = (low + high) // 2
            if self.fits_low(self.made(override(recipe, {path: middle + 1}))):
                low = middle + 1
            else:
                high = middle
                more = {**(beside or {}), path: middle + 1}
                if least and rate(self.made(override(recipe, more))) < least:
                    return None
        return low

    def _along(self, recipe: Recipe, tops: dict[str, int], least: float) -> Plan | None:
        """The fastest along the edge of two counts, by branch and bound."""
        best: Plan | None = None

        def at(resident: int, keep: int) -> Plan:
            return self.made(override(recipe, {RESIDENT: resident, KEEP: keep}))

        def take(made: Plan) -> None:
            nonlocal best, least
            if self.budget.fits(made) and rate(made) > (0.0 if best is None else rate(best)):
                best, least = made, max(least, rate(made))

        def look(first: int, last: int, keep_first: int, keep_last: int) -> None:
            """Between two points of the edge, which are taken already."""
            if last - first <= 1 or rate(at(last, keep_first)) < least:
                return
            middle = (first + last) // 2
            there = override(recipe, {RESIDENT: middle})
            keep = self.largest(there, KEEP, keep_first, low=keep_last)
            assert keep is not None, "no least is asked for"
            take(at(middle, keep))
            look(first, middle, keep_first, keep)
            look(middle, last, keep, keep_last)

        first, last = tops[KEEP], tops[RESIDENT]
        end = self.largest(override(recipe, {RESIDENT: last}), KEEP, first)
        assert end is not None, "no least is asked for"
        take(at(0, first))
        take(at(last, end))
        look(0, last, first, end)
        return best

    def shrunk(self, made: Plan, least: float) -> Plan:
        """The plan with the fewest kept and then resident blocks that still reach the rate."""
        for path in (KEEP, RESIDENT):
            if path not in counts(made.recipe, self.planner.setting):
                continue
            if path == KEEP and RESIDENT in counts(made.recipe, self.planner.setting):
                made = self._without_keeping(made, least)
            low, high = 0, int(value_of(made.recipe, path))
            while low < high:
                middle = (low + high) // 2
                other = self.made(override(made.recipe, {path: middle}))
                if rate(other) >= least and self.budget.fits(other):
                    high = middle
                else:
                    low = middle + 1
            made = self.made(override(made.recipe, {path: high}))
        return made

    def _without_keeping(self, made: Plan, least: float) -> Plan:
        """The same with more resident blocks in place of the kept ones, where that is as fast."""
        bare = override(made.recipe, {KEEP: 0})
        most = counts(bare, self.planner.setting)[RESIDENT]
        low = int(value_of(bare, RESIDENT))
        top = self.largest(bare, RESIDENT, most, low=low)
        other = self.made(override(bare, {RESIDENT: top or 0}))
        return other if rate(other) >= least and self.budget.fits(other) else made
