"""How fast a step can be, and what limits it: matrix products, memory, the bus or launches.

    pass  = max(forward on the device, forward over the bus)
          + max(backward on the device, backward over the bus)
    step  = max(passes x pass + update, host's time to launch all of it)

On the device, a stage takes its products over their rate and its bytes over the bandwidth, one
after the other. Stages do not lend each other time: a forward that waits for the bus is not helped
by a backward that does not. The host runs ahead of the device through a whole step; launches are
kernels times what Python takes around each, and hardly any in a pass that is replayed as a CUDA
graph. What there is to do is counted in `counting.py`.

Constants were fitted on one H200 to rows of bench/results (tests/spec/test_speed.py has planned and
measured side by side). A card brings its own rates (`hardware.toml`, or `nibble plan --calibrate`).
It is an estimate for planning, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nibble.spec.activations import Work
from nibble.spec.checkpointing import keeping
from nibble.spec.config import Recipe
from nibble.spec.counting import BACKWARD, FORWARD, Count, Stage
from nibble.spec.graphs import wish
from nibble.spec.hardware import Hardware
from nibble.spec.holdings import Devices, Holding, placement_kind
from nibble.spec.inventory import Inventory

MATMUL, MEMORY, BUS, LAUNCHES = "matmul", "memory", "bus", "launches"
"""What a step can be limited by."""
HOST_FUSED, HOST_UNFUSED = 6.0, 4.0
"""Python's time around a kernel, in bare launches: functions of our own, and torch's."""
REPLAYED_S = 2e-6
"""From kernel to kernel of a graph, however small they are."""
SYNCHRONISED_SHARE = 0.4
"""Of the host's time, in which the device waits when each layer asks it for outliers (int8's eager
steps; the kernels keep the answer on the device)."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of a step by what they are spent on, and what follows from them."""

    forward: Stage
    """Of all passes of a step."""
    backward: Stage
    update: Stage
    launches_s: float
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
    def step_s(self) -> float:
        """Seconds of a step."""
        stages = sum(stage.seconds for stage in self.stages.values())
        return max(stages + self.waiting_s, self.launches_s)

    @property
    def limiter(self) -> str:
        """What the step waits for most: matmul, memory, bus or launches."""
        if self.launches_s >= self.step_s:
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
    python = HOST_FUSED if work.fused else HOST_UNFUSED
    is_replayed = wish(recipe) != "off" and not count.synchronises and not hardware.is_cpu
    each_s = REPLAYED_S if is_replayed else python * hardware.launch_s
    launches_s = passes * count.kernels() * each_s
    launches_s += count.update_kernels() * python * hardware.launch_s
    if placement_kind(recipe.place, devices.total) == "dp":
        launches_s *= devices.per_machine  # one process launches for all
    return flops * devices.total, Speed(
        forward=forward.times(passes),
        backward=backward.times(passes),
        update=count.update(hardware),
        launches_s=launches_s,
        waiting_s=SYNCHRONISED_SHARE * launches_s if count.synchronises else 0.0,
        tokens_per_step=passes * work.tokens * devices.total,
        num_devices=devices.total,
        power_w=hardware.power_w,
        price_usd_hour=hardware.price_usd_hour,
    )
