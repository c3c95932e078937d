"""Settings that are `auto`: the largest value whose plan fits the budget, and whether graphs pay.

Two are counts of blocks for which memory buys time: blocks that need not be pulled over the bus
(`place.resident_blocks`), and blocks that need not be computed again (`train.keep_blocks`). Memory
grows with either, so the largest that fits is found by halving. A bus that is not waited for gains
nothing from resident blocks, but they cost nothing else either; so what is left after them is given
to keeping only where blocks are not streamed, or where the bus is not what limits.

`train.cuda_graphs` is on where all of these hold, each by the plan alone:

    the host needs at least 75 % of the device's time for a pass, where nothing is recorded
    placement and recipe allow it, gradients (which stay then) are at most 1 GiB
    the plan with recorded passes fits, and is not slower (fewer blocks may be kept beside them)

The counts are taken with and without graphs, as both want memory. Without a budget, nothing is
known to fit: counts are 0, and there are no graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nibble.spec.advice import apply
from nibble.spec.arch import Architecture
from nibble.spec.config import Recipe
from nibble.spec.graphs import (
    HOST_SHARE,
    MAX_GRAD_BYTES,
    PLACEMENTS,
    cannot_be_recorded,
    waits_for_masks,
)
from nibble.spec.hardware import Hardware
from nibble.spec.holdings import ONE_DEVICE, Devices, placement_kind
from nibble.spec.inventory import Inventory, inventory
from nibble.spec.plan import Plan, plan
from nibble.spec.speed import BUS
from nibble.spec.units import show_bytes

RESIDENT, KEEP, GRAPHS = "place.resident_blocks", "train.keep_blocks", "train.cuda_graphs"
SLOWER = 1.02
"""Plans of steps differ by less than this for no reason."""


@dataclass(frozen=True, kw_only=True)
class Decided:
    """A recipe with nothing `auto` left in it; `graphs` says in a line why passes are recorded or
    not, and is empty where that was not open.
    """

    recipe: Recipe
    graphs: str


def decide(
    recipe: Recipe,
    *,
    architecture: Architecture,
    hardware: Hardware | None = None,
    on_cpu: bool | None = None,
    devices: Devices = ONE_DEVICE,
    limit_bytes: int | None = None,
) -> Recipe:
    """The recipe with values in place of `auto`, for these devices.

    `limit_bytes`: of one device, context included (default: the plan's own `limit`).
    """
    return decide_and_say(
        recipe,
        architecture=architecture,
        hardware=hardware,
        on_cpu=on_cpu,
        devices=devices,
        limit_bytes=limit_bytes,
    ).recipe


def decide_and_say(
    recipe: Recipe,
    *,
    architecture: Architecture,
    hardware: Hardware | None = None,
    on_cpu: bool | None = None,
    devices: Devices = ONE_DEVICE,
    limit_bytes: int | None = None,
) -> Decided:
    """As `decide`, and why. On a CPU `train.cuda_graphs` stays open: it has no meaning there."""

    def planned(words: Recipe) -> Plan:
        return plan(
            words, architecture=architecture, hardware=hardware, on_cpu=on_cpu, devices=devices
        )

    def fits(words: Recipe) -> bool:
        made = planned(words)
        limit = made.limit() if limit_bytes is None else limit_bytes
        return limit is not None and made.fits(limit)

    def counted(words: Recipe) -> Recipe:
        return _counts(words, architecture.sizes.num_layers, planned, fits, devices)

    is_cpu = recipe.place.device == "cpu" if on_cpu is None else on_cpu
    if recipe.train.cuda_graphs != "auto" or is_cpu:
        return Decided(recipe=counted(recipe), graphs="")
    eager = counted(apply(recipe, {GRAPHS: False}))
    made = planned(eager)
    against = _against_graphs(made, inventory(eager, architecture))
    if against:
        return Decided(recipe=eager, graphs=f"no CUDA graphs: {against}")
    recorded = counted(apply(recipe, {GRAPHS: True}))
    replayed = planned(recorded)
    assert made.speed is not None and replayed.speed is not None
    if not fits(recorded):
        needed = show_bytes(replayed.device_bytes)
        return Decided(recipe=eager, graphs=f"no CUDA graphs: {needed} would be needed with them")
    if replayed.speed.step_s > SLOWER * made.speed.step_s:
        return Decided(recipe=eager, graphs="no CUDA graphs: more blocks fit without them")
    share = f"{made.speed.host_share:.0%}"
    return Decided(
        recipe=recorded, graphs=f"CUDA graphs: the host needs {share} of the device's time"
    )


def _against_graphs(eager: Plan, stock: Inventory) -> str:
    """Why passes of a plan should not be recorded, memory apart; or an empty text."""
    kind, speed = placement_kind(eager.recipe.place, eager.devices.total), eager.speed
    if setting := cannot_be_recorded(eager.recipe):
        return setting
    if kind not in PLACEMENTS:
        return f"place.kind={kind}"
    if waits_for_masks(stock.architecture.style.scores):
        return "transformers makes the masks of its attention by way of the host"
    if speed is None:
        return "the card's speed is not known (nibble plan --calibrate measures it)"
    if speed.waiting_s > 0:
        return "the host waits for the device in every layer"
    if speed.host_share < HOST_SHARE:
        return f"the device is busy anyway (the host needs {speed.host_share:.0%} of its time)"
    if stock.gradient_bytes > MAX_GRAD_BYTES:
        return f"{show_bytes(stock.gradient_bytes)} of gradients would stay"
    return ""


def _counts(
    recipe: Recipe,
    num_blocks: int,
    planned: Callable[[Recipe], Plan],
    fits: Callable[[Recipe], bool],
    devices: Devices,
) -> Recipe:
    """The recipe with numbers of blocks in place of `auto`."""
    resident = recipe.place.resident_blocks == "auto"
    resident = resident and placement_kind(recipe.place, devices.total) == "stream"
    keeps = recipe.train.keep_blocks == "auto"
    made = apply(recipe, {RESIDENT: 0} if resident else {})
    made = apply(made, {KEEP: 0} if keeps else {})
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
