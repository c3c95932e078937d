"""The plan: what a run needs, in bytes by category at each phase, and how fast it can be.

    peak = max over phases of  weights + gradients + optimiser + activations + workspaces
                               + allocator's loss (3.5 %) + CUDA context (0.75 GiB)

Idea. Every phase (load, first step, steady step, evaluation, save, merge) passes through a few
moments; a moment is a dictionary of categories, and the phase is its largest moment. Tensors that
stay are counted exactly (`inventory.py`: the tables that allocate them), activations by the list of
what autograd keeps (`activations.py`), and only workspaces and the allocator are estimates, named
below with their source. `check` refuses what does not fit and says which small changes would
(`advice.py`), each planned again.

It costs milliseconds, needs no torch and no GPU, and allocates nothing. Speed is `speed.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nibble.errors import PlanError
from nibble.spec.arch import Architecture
from nibble.spec.config import Recipe
from nibble.spec.hardware import Hardware
from nibble.spec.holdings import ONE_DEVICE, Devices, holding, placement_kind
from nibble.spec.host_memory import HOST_CATEGORIES
from nibble.spec.inventory import Inventory, inventory
from nibble.spec.phases import (
    CATEGORIES,
    CUDA_CONTEXT_BYTES,
    MERGE,
    PHASES,
    Pass,
    Phase,
    Run,
    phase,
    work_of,
)
from nibble.spec.speed import Speed, estimate
from nibble.spec.units import parse_bytes, show_bytes

PLAN_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs. `on_cpu`: the device's categories are host memory as well."""

    recipe: Recipe
    architecture: Architecture
    """With the blocks that an expansion adds."""
    source: Architecture
    """As the checkpoint has it."""
    hardware: Hardware | None
    on_cpu: bool
    devices: Devices
    num_trainable: int
    num_total: int
    phases: tuple[Phase, ...]
    tokens_per_step: int
    flops_per_step: float
    speed: Speed | None

    @property
    def run_phases(self) -> tuple[Phase, ...]:
        """The phases of the run itself: what a budget is held against. Merging comes after it, in a
        process of its own, which `--device cpu` takes off the card.
        """
        return tuple(phase for phase in self.phases if phase.name != MERGE)

    @property
    def peak(self) -> Phase:
        """The phase of the run with the most device memory."""
        return max(self.run_phases, key=lambda phase: phase.device_bytes)

    @property
    def device_bytes(self) -> int:
        """Peak of the device, CUDA context included."""
        return self.peak.device_bytes

    @property
    def host_bytes(self) -> int:
        """Peak of the host; on a CPU the device's bytes are in it."""
        return max(p.host_bytes + (p.device_bytes if self.on_cpu else 0) for p in self.run_phases)

    @property
    def allocator_bytes(self) -> int:
        """Peak without the CUDA context: what a cap on the allocator is compared with."""
        return max(p.device_bytes - p.device.get("cuda_context", 0) for p in self.run_phases)

    def limit(self) -> int | None:
        """The budget that the recipe or the card names, in bytes, context included; or None."""
        limits = []
        if self.recipe.place.vram is not None and not self.on_cpu:
            limits.append(parse_bytes(self.recipe.place.vram) + CUDA_CONTEXT_BYTES)
        if self.hardware is not None and not self.on_cpu:
            limits.append(self.hardware.memory_bytes)
        return min(limits) if limits else None

    @property
    def run_tokens(self) -> int | None:
        """Tokens of the whole run where the recipe says how many; epochs need the data."""
        train = self.recipe.train
        if train.max_steps is not None:
            return train.max_steps * self.tokens_per_step
        if train.max_tokens is not None:
            return -(-train.max_tokens // self.tokens_per_step) * self.tokens_per_step
        return None

    def fits(self, limit_bytes: int | None = None) -> bool:
        """Whether the peak is within the budget (`limit()` when not given); True without one."""
        limit = self.limit() if limit_bytes is None else limit_bytes
        if limit is None:
            return True
        return (self.host_bytes if self.on_cpu else self.device_bytes) <= limit

    def check_host(self, available_bytes: int | None = None) -> None:
        """Raise PlanError when one machine's memory will not do: what is free there, or the
        recipe's own budget.
        """
        ram = self.recipe.place.ram
        budget = None if ram is None else parse_bytes(ram)
        limit = min((n for n in (available_bytes, budget) if n is not None), default=None)
        if limit is None or self.host_bytes <= limit:
            return
        phase = max(self.run_phases, key=lambda p: p.host_bytes)
        largest = max(phase.host.items(), key=lambda item: item[1])
        from nibble.spec.advice import advise_host

        found = "; ".join(f"{a.words} ({show_bytes(a.bytes)})" for a in advise_host(self, limit))
        raise PlanError(
            f"needs {show_bytes(self.host_bytes)} of host memory ({phase.name}), "
            f"{show_bytes(limit)} are to be had; most of it is {HOST_CATEGORIES[largest[0]]} "
            f"({show_bytes(largest[1])}): "
            + (f"would fit: {found}" if found else "take fewer devices, or raise place.ram")
        )

    def check(self, limit_bytes: int | None = None) -> None:
        """Raise PlanError when the run does not fit, naming the changes that would make it fit."""
        limit = self.limit() if limit_bytes is None else limit_bytes
        if limit is None or self.fits(limit):
            return
        from nibble.spec.advice import advise

        needed = self.host_bytes if self.on_cpu else self.device_bytes
        largest = max(self.peak.device.items(), key=lambda item: item[1])
        found = advise(self, limit)
        text = "; ".join(f"{change.words} ({show_bytes(change.bytes)})" for change in found)
        raise PlanError(
            f"needs {show_bytes(needed)} at its peak ({self.peak.name}: {self.peak.moment}), the "
            f"budget is {show_bytes(limit)}; most of it is {CATEGORIES[largest[0]]} "
            f"({show_bytes(largest[1])}). "
            + (f"Would fit: {text}" if found else "No small change would fit: take a smaller model")
        )

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; bytes are whole numbers."""
        limit = self.limit()
        return {
            "version": PLAN_VERSION,
            "model": self.recipe.model.path,
            "model_type": self.architecture.model_type,
            "shapes_from": self.architecture.source,
            "hardware": None if self.hardware is None else self.hardware.name,
            "on_cpu": self.on_cpu,
            "placement": placement_kind(self.recipe.place, self.devices.total),
            "devices_per_machine": self.devices.per_machine,
            "machines": self.devices.machines,
            "num_trainable": self.num_trainable,
            "num_total": self.num_total,
            "tokens_per_step": self.tokens_per_step,
            "flops_per_step": self.flops_per_step,
            "speed": None if self.speed is None else self.speed.to_json(),
            "run": self._run_json(),
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "limit_bytes": limit,
            "fits": None if limit is None else self.fits(limit),
            "peak_phase": self.peak.name,
            "phases": {
                phase.name: {
                    "moment": phase.moment,
                    "device": dict(phase.device),
                    "device_bytes": phase.device_bytes,
                    "host": dict(phase.host),
                    "host_bytes": phase.host_bytes,
                }
                for phase in self.phases
            },
        }

    def _run_json(self) -> dict[str, Any] | None:
        """Hours, energy and money of the whole run; None where its tokens are not known."""
        tokens, speed = self.run_tokens, self.speed
        if tokens is None or speed is None:
            return None if tokens is None else {"tokens": tokens}
        return {
            "tokens": tokens,
            "hours": speed.hours(tokens),
            "kwh": speed.energy_kwh(tokens),
            "usd": speed.cost_usd(tokens),
        }


def plan(
    recipe: Recipe,
    *,
    architecture: Architecture,
    hardware: Hardware | None = None,
    on_cpu: bool | None = None,
    devices: Devices = ONE_DEVICE,
    stock: Inventory | None = None,
) -> Plan:
    """Plan a run of `recipe` on a model of this shape.

    `hardware`: the card, for speed and its memory limit. `on_cpu`: whether the run has no GPU; when
    not given, only for place.device=cpu. `devices`: how many share the run; bytes are of one device
    and of one machine, tokens and speed of all. `stock`: the recipe's inventory, if it has been
    taken already. Raises ConfigError for words that this model cannot mean.
    """
    on_cpu = recipe.place.device == "cpu" if on_cpu is None else on_cpu
    stock = inventory(recipe, architecture) if stock is None else stock
    work = work_of(recipe, stock, on_cpu=on_cpu)
    run = Run(
        recipe=recipe,
        stock=stock,
        held=holding(recipe, stock, devices),
        seen=Pass.of(recipe, stock, work),
        on_cpu=on_cpu,
    )
    can_merge = recipe.adapter.kind != "factorised"  # a model of factors has no other form
    phases = tuple(phase(name, run) for name in PHASES if can_merge or name != MERGE)
    # On a processor only its own measured row is of use.
    rates = hardware if hardware is not None and hardware.is_cpu == on_cpu else None
    flops, speed = estimate(recipe, stock, work, hardware=rates, held=run.held, devices=devices)
    return Plan(
        recipe=recipe,
        architecture=stock.architecture,
        source=architecture,
        hardware=hardware,
        on_cpu=on_cpu,
        devices=devices,
        num_trainable=stock.num_trainable,
        num_total=stock.num_total,
        phases=phases,
        tokens_per_step=work.tokens * recipe.train.gradient_accumulation_steps * devices.total,
        flops_per_step=flops,
        speed=speed,
    )
