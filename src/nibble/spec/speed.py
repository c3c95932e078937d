"""How fast a step can be, and what limits it: matrix products, memory, the bus or launches.

    forward, backward, update = max(products + bytes, transfers), each on its own
    device is done   = max(max(device was done, host was done) + stage, host is done)
    host is done     = host was done + its time to launch the stage

and so on through the passes of a step to its update, as work goes through two machines in a row.
On the device, a stage takes its products over their rate and its bytes over the bandwidth, one
after the other. Stages do not lend each other time: a forward that waits for the bus is not helped
by a backward that does not. The host runs ahead of the device through a whole step, so a large
update or loss behind blocks that wait for Python adds to them. Updates in backward are part of it.
A pass that is replayed as a CUDA graph takes hardly any of the host's time. What there is to do is
counted in `counting.py`.

A card brings its own rates (`hardware.toml`, or `nibble plan --calibrate`). Planned and measured
steps are side by side in tests/spec/test_speed.py. It is an estimate, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nibble.spec.activations import Work
from nibble.spec.checkpointing import keeping
from nibble.spec.config import Recipe
from nibble.spec.counting import BACKWARD, FORWARD, Count, Stage
from nibble.spec.graphs import HOST_SHARE, PLACEMENTS, cannot_be_recorded, waits_for_masks
from nibble.spec.hardware import Hardware
from nibble.spec.holdings import Devices, Holding, placement_kind
from nibble.spec.inventory import Inventory

MATMUL, MEMORY, BUS, LAUNCHES = "matmul", "memory", "bus", "launches"
"""What a step can be limited by."""
SYNCHRONISED_SHARE = 0.2
"""Of the host's time, in which the device waits when each layer asks it for outliers (int8's eager
steps; the kernels keep the answer on the device)."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of a step by what they are spent on, and what follows from them."""

    forward: Stage
    """Of all passes of a step."""
    backward: Stage
    update: Stage
    num_passes: int
    in_backward: bool
    """Whether updates happen as gradients come."""
    waiting_s: float
    """In which the device waits for a host that waits for it."""
    tokens_per_step: int
    num_devices: int
    power_w: float | None
    """Of one device; None when not known."""
    price_usd_hour: float | None
    """Of one device."""

    @property
    def stages(self) -> dict[str, Stage]:
        """The three by name."""
        return {"forward": self.forward, "backward": self.backward, "update": self.update}

    @property
    def products_s(self) -> float:
        """Matrix products of a step."""
        return sum(stage.products_s for stage in self.stages.values())

    @property
    def memory_s(self) -> float:
        """Bytes of device memory moved in a step, over the bandwidth."""
        return sum(stage.memory_s for stage in self.stages.values())

    @property
    def bus_s(self) -> float:
        """Bytes over the bus in a step."""
        return sum(stage.bus_s for stage in self.stages.values())

    @property
    def launches_s(self) -> float:
        """The host's time to launch a step."""
        return sum(stage.launch_s for stage in self.stages.values())

    @property
    def host_share(self) -> float:
        """The host's time to launch the passes, of the device's time for them."""
        return _host_share(self.forward, self.backward)

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        order = [each.times(1 / self.num_passes) for each in (self.forward, self.backward)]
        order = [*order * self.num_passes, self.update]
        pairs = [(stage.seconds, stage.launch_s) for stage in order]
        if self.in_backward:
            (backward_s, launch_s), (update_s, more_s) = pairs[-2:]
            pairs[-2:] = [(backward_s + update_s, launch_s + more_s)]
        device = host = 0.0
        for stage_s, launch_s in pairs:
            device = max(max(device, host) + stage_s, host + launch_s)
            host += launch_s
        return device + self.waiting_s

    @property
    def limiter(self) -> str:
        """What the step waits for most: matmul, memory, bus or launches."""
        if self.launches_s >= sum(stage.seconds for stage in self.stages.values()):
            return LAUNCHES
        shares = {MATMUL: 0.0, MEMORY: 0.0, BUS: 0.0, LAUNCHES: self.waiting_s}
        for stage in self.stages.values():
            if stage.bus_s > stage.device_s:
                shares[BUS] += stage.bus_s
            else:
                shares[MATMUL] += stage.products_s
                shares[MEMORY] += stage.memory_s
        return max(shares, key=lambda name: shares[name])

    @property
    def tokens_per_s(self) -> float:
        """Tokens of a step over its seconds, of all devices."""
        return self.tokens_per_step / self.step_s

    def hours(self, num_tokens: float) -> float:
        """Hours for so many tokens."""
        return num_tokens / self.tokens_per_s / 3600

    def energy_kwh(self, num_tokens: float) -> float | None:
        """The cards' energy at their board power, an upper bound; None when that is not known."""
        if self.power_w is None:
            return None
        return self.hours(num_tokens) * self.num_devices * self.power_w / 1000

    def cost_usd(self, num_tokens: float) -> float | None:
        """Rent for so many tokens; None when the card's price is not known."""
        if self.price_usd_hour is None:
            return None
        return self.hours(num_tokens) * self.num_devices * self.price_usd_hour

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "step_s": self.step_s,
            "products_s": self.products_s,
            "memory_s": self.memory_s,
            "launches_s": self.launches_s,
            "bus_s": self.bus_s,
            "stages_s": {name: stage.seconds for name, stage in self.stages.items()},
            "limiter": self.limiter,
            "tokens_per_s": self.tokens_per_s,
            "hours_per_million_tokens": self.hours(1e6),
            "kwh_per_million_tokens": self.energy_kwh(1e6),
            "usd_per_million_tokens": self.cost_usd(1e6),
        }


def _host_share(forward: Stage, backward: Stage) -> float:
    return (forward.launch_s + backward.launch_s) / (forward.device_s + backward.device_s)


def estimate(
    recipe: Recipe,
    stock: Inventory,
    work: Work,
    *,
    hardware: Hardware | None,
    held: Holding,
    devices: Devices,
) -> tuple[float, Speed | None]:
    """FLOPs of a step on all devices, and its speed where the card is known."""
    passes = recipe.train.gradient_accumulation_steps
    blocks = keeping(stock.architecture, work, recipe.train)
    count = Count(recipe=recipe, stock=stock, work=work, blocks=blocks, held=held, devices=devices)
    flops = passes * sum(sum(count.flops(stage)) for stage in (FORWARD, BACKWARD))
    if hardware is None:
        return flops * devices.total, None
    forward, backward = count.stage(FORWARD, hardware), count.stage(BACKWARD, hardware)
    update = count.update(hardware)
    asked, kind = recipe.train.cuda_graphs, placement_kind(recipe.place, devices.total)
    can = kind in PLACEMENTS and not (
        cannot_be_recorded(recipe)
        or waits_for_masks(stock.architecture.style.scores)
        or hardware.is_cpu
    )
    # What is `auto` counts as it would be decided if there is memory for it (decide.py).
    wanted = asked is True or (asked == "auto" and _host_share(forward, backward) >= HOST_SHARE)
    if wanted and can and not count.synchronises:
        forward, backward = replace(forward, launch_s=0.0), replace(backward, launch_s=0.0)
    num_driven = 1  # one process launches for all in `dp`
    if kind == "dp":
        num_driven = devices.per_machine
    stages = [
        replace(stage, launch_s=num_driven * stage.launch_s)
        for stage in (forward.times(passes), backward.times(passes), update)
    ]
    launches_s = sum(stage.launch_s for stage in stages)
    return flops * devices.total, Speed(
        forward=stages[0],
        backward=stages[1],
        update=stages[2],
        num_passes=passes,
        in_backward=recipe.optim.layerwise,
        waiting_s=SYNCHRONISED_SHARE * launches_s if count.synchronises else 0.0,
        tokens_per_step=passes * work.tokens * devices.total,
        num_devices=devices.total,
        power_w=hardware.power_w,
        price_usd_hour=hardware.price_usd_hour,
    )
