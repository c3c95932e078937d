"""Settings that are `auto`: the largest value whose plan fits the budget.

Each is a count of blocks for which memory buys time: blocks that need not be pulled over the bus
(`place.resident_blocks`), and blocks that need not be computed again (`train.keep_blocks`). Memory
grows with either, so the largest that fits is found by halving. A bus that is not waited for gains
nothing from resident blocks, but they cost nothing else either; so what is left after them is given
to keeping only where blocks are not streamed, or where the bus is not what limits.

Without a budget, nothing is known to fit, and both are 0.
"""

from __future__ import annotations

from collections.abc import Callable

from nibble.spec.advice import apply
from nibble.spec.arch import Architecture
from nibble.spec.config import Recipe
from nibble.spec.hardware import Hardware
from nibble.spec.holdings import ONE_DEVICE, Devices, placement_kind
from nibble.spec.plan import Plan, plan
from nibble.spec.speed import BUS

RESIDENT, KEEP = "place.resident_blocks", "train.keep_blocks"


def decide(
    recipe: Recipe,
    *,
    architecture: Architecture,
    hardware: Hardware | None = None,
    on_cpu: bool | None = None,
    devices: Devices = ONE_DEVICE,
    limit_bytes: int | None = None,
) -> Recipe:
    """The recipe with numbers in place of `auto`, for these devices.

    `limit_bytes`: of one device, context included (default: the plan's own `limit`).
    """

    def planned(words: Recipe) -> Plan:
        return plan(
            words, architecture=architecture, hardware=hardware, on_cpu=on_cpu, devices=devices
        )

    def fits(words: Recipe) -> bool:
        made = planned(words)
        limit = made.limit() if limit_bytes is None else limit_bytes
        return limit is not None and made.fits(limit)

    resident = recipe.place.resident_blocks == "auto"
    resident = resident and placement_kind(recipe.place, devices.total) == "stream"
    keeps = recipe.train.keep_blocks == "auto"
    made = apply(recipe, {RESIDENT: 0} if resident else {})
    made = apply(made, {KEEP: 0} if keeps else {})
    num_blocks = architecture.sizes.num_layers
    if resident:
        speed = planned(made).speed
        waits = speed is None or speed.limiter == BUS
        if waits or not keeps:
            made = _largest(made, RESIDENT, num_blocks, fits)
    if keeps:
        made = _largest(made, KEEP, num_blocks, fits)
    return made


def _largest(recipe: Recipe, path: str, most: int, fits: Callable[[Recipe], bool]) -> Recipe:
    """The largest count up to `most` that fits; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(apply(recipe, {path: middle})):
            low = middle
        else:
            high = middle - 1
    return apply(recipe, {path: low})
