"""Plans of many recipes of one model: what they may take, what is best, each planned once.

A search asks for the same plan again and again, and for hundreds that differ in a setting or two.
Inventories are remembered by what they follow from, plans by the recipe's sections. Nothing is
decided here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nibble.errors import ConfigError
from nibble.spec.arch import Architecture
from nibble.spec.choices import Setting
from nibble.spec.config import Recipe
from nibble.spec.hardware import Hardware
from nibble.spec.holdings import Devices
from nibble.spec.inventory import Inventory, inventory
from nibble.spec.phases import CUDA_CONTEXT_BYTES
from nibble.spec.plan import Plan, plan
from nibble.spec.units import parse_bytes, show_bytes

SPARE_SHARE = 0.03
"""Of a card, that a search leaves free: by so much a plan may be too small and still be right."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a plan may take: `device_bytes` of each card, `host_bytes` of each machine; None is no
    limit. `spare_bytes`: of a card left free.
    """

    device_bytes: int | None
    host_bytes: int | None
    spare_bytes: int = 0

    def device_excess(self, made: Plan) -> int:
        """Bytes by which a plan is too large for the device; 0 where it fits, or has none."""
        if made.on_cpu or self.device_bytes is None:
            return 0
        return max(0, made.device_bytes - self.device_bytes + self.spare_bytes)

    def host_excess(self, made: Plan) -> int:
        """Bytes by which a plan is too large for the host."""
        return 0 if self.host_bytes is None else max(0, made.host_bytes - self.host_bytes)

    def fits(self, made: Plan) -> bool:
        """Whether it is within both."""
        return self.device_excess(made) == 0 and self.host_excess(made) == 0

    def words(self) -> str:
        """The budget for a message."""
        parts = []
        if self.device_bytes is not None:
            spare = f" less {show_bytes(self.spare_bytes)} to spare" if self.spare_bytes else ""
            parts.append(f"{show_bytes(self.device_bytes)} of a card{spare}")
        if self.host_bytes is not None:
            parts.append(f"{show_bytes(self.host_bytes)} of the host")
        return " and ".join(parts) or "no budget"


def budget_of(
    recipe: Recipe,
    *,
    device_bytes: int | None,
    host_bytes: int | None,
    on_cpu: bool = False,
    card: str = "the card",
) -> Budget:
    """The recipe's own budgets within what there is: of one card in all, of the host for the run.

    None is what is not known. Raises ConfigError for a budget above what there is, and where
    neither is known.
    """
    vram, ram = recipe.place.vram, recipe.place.ram
    device = None if on_cpu else device_bytes
    if vram is not None and not on_cpu:
        wanted = parse_bytes(vram)
        if device is not None and wanted > device:
            raise ConfigError(
                f"place.vram={vram} is more than {card} has ({show_bytes(device)}): lower it, or "
                "leave it out"
            )
        wanted += CUDA_CONTEXT_BYTES
        device = wanted if device is None else min(device, wanted)
    host = host_bytes
    if ram is not None:
        host = parse_bytes(ram, option="place.ram")
        if host_bytes is not None and host > host_bytes:
            raise ConfigError(
                f"place.ram={ram} is more than is free here ({show_bytes(host_bytes)}): lower it, "
                "or leave it out"
            )
    if device is None and (host is None or not on_cpu):
        raise ConfigError(
            "fit needs a budget: name a card (--gpu rtx4090), or give place.vram such as 24GiB"
        )
    spare = 0 if device is None else int(SPARE_SHARE * device)
    return Budget(device_bytes=device, host_bytes=host, spare_bytes=spare)


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Plans recipes of one model and its data on the same devices, each once."""

    architecture: Architecture
    hardware: Hardware | None
    on_cpu: bool
    devices: Devices
    _stocks: dict[object, Inventory] = field(default_factory=dict)
    _plans: dict[object, Plan] = field(default_factory=dict)

    def __call__(self, recipe: Recipe) -> Plan:
        """The plan of a recipe. Raises ConfigError for words that this model cannot mean."""
        learnt = (recipe.quant, recipe.adapter, recipe.optim)
        data = (recipe.data.max_length, recipe.data.packing)
        whole = (*learnt, recipe.train, recipe.place, *data)
        if whole in self._plans:
            return self._plans[whole]
        train = recipe.train
        key = (*learnt, train.precision, train.adapter_precision)
        if key not in self._stocks:
            self._stocks[key] = inventory(recipe, self.architecture)
        made = plan(
            recipe,
            architecture=self.architecture,
            hardware=self.hardware,
            on_cpu=self.on_cpu,
            devices=self.devices,
            stock=self._stocks[key],
        )
        self._plans[whole] = made
        return made

    @property
    def setting(self) -> Setting:
        """What choices depend on besides the recipe."""
        return Setting(architecture=self.architecture, devices=self.devices, on_cpu=self.on_cpu)


def rate(made: Plan) -> float:
    """What is maximised: tokens a second, or tokens a FLOP where the card is not known."""
    if made.speed is not None:
        return made.speed.tokens_per_s
    return made.tokens_per_step / max(1.0, made.flops_per_step)
