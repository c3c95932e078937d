"""One row a method: what training a model by it needs on a card, how fast, for how much.

Idea. A method is a few words of a recipe. Each is planned on the same model, rows and budget, with
everything else chosen for it: micro-batch, checkpointing, placement, as `fit` chooses for a run.
What a row costs is `plan.py`'s arithmetic; what it learns comes from stored runs (`quality.py`),
and where there is none it says so.

It compares plans, not runs: bytes and seconds are estimates of one model, quality is measured on
others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nibble.errors import ConfigError, PlanError
from nibble.spec.arch import Architecture
from nibble.spec.builtin_models import is_builtin
from nibble.spec.choices import Setting, override
from nibble.spec.config import Recipe
from nibble.spec.hardware import Hardware
from nibble.spec.holdings import Devices
from nibble.spec.load import load_recipe
from nibble.spec.plan import Plan
from nibble.spec.planner import Budget, Planner, budget_of
from nibble.spec.quality import (
    NOT_MEASURED,
    REFERENCE,
    ReferenceRun,
    is_reference,
    losses_of,
    runs_of,
)
from nibble.spec.search import search, smallest, starting
from nibble.spec.units import parse_bytes

DEFAULT_TOKENS = 10_000_000
"""What hours and money are told for when the words name no budget (train.max_tokens)."""
DEFAULT_ROWS = 16
"""Rows of one update over all devices, the same for all methods."""
RANK_SHARE = 4
"""GaLore's rank is the width over this, as in arXiv 2403.03507 (1024 of 4096 for a 7B)."""

Words = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method: its key, what it is called, and its words; of several sets the first that fits."""

    key: str
    name: str
    variants: tuple[Words, ...]
    ranked: bool = False
    """Its gradients have a rank that follows the model's width."""
    learns_as: str = ""
    """The key of another method that computes the same, to the bit; its runs count here."""

    @property
    def quality_key(self) -> str:
        """Whose stored runs say what it learns."""
        return self.learns_as or self.key


_LORA: Words = {"adapter.kind": "lora"}
_GALORE: Words = {"optim.layerwise": True, "optim.basis": "randomised"}
_IN_BACKWARD: Words = {
    "optim.layerwise": True,
    "optim.in_backward": True,
    "optim.max_grad_norm": None,
    "train.gradient_accumulation_steps": 1,
}
"""No gradient of a matrix is kept, so an update is one pass of all its rows."""
_ONE_ROW: Words = {"train.micro_batch_size": 1}
"""The same with updates of one row, where nothing else fits."""
_GALORE_8BIT: Words = {
    **_GALORE,
    "optim.method": "galore8bit",
    "optim.basis_storage": "bf16",
}
_BALANCED: Words = {"optim.method": "balanced"}
_BALANCED_8BIT: Words = {
    **_BALANCED,
    **_IN_BACKWARD,
    "optim.state": "8bit",
    "optim.basis_storage": "bf16",
}
_APOLLO_MINI: Words = {"optim.method": "apollo-mini"}
METHODS: tuple[Method, ...] = (
    Method(key="full", name="full", variants=({}, {"optim.name": "adamw8bit"})),
    Method(
        key="galore",
        name="GaLore 8 bit",
        variants=(
            _GALORE_8BIT,
            {**_GALORE_8BIT, **_IN_BACKWARD},
            {**_GALORE_8BIT, **_IN_BACKWARD, **_ONE_ROW},
        ),
        ranked=True,
    ),
    Method(
        key="q-galore",
        name="Q-GaLore",
        variants=({**_GALORE, "optim.method": "q-galore", "optim.weights": "int8"},),
        ranked=True,
    ),
    Method(
        key="balanced",
        name="balanced",
        variants=(
            _BALANCED,
            {**_BALANCED, **_IN_BACKWARD},
            _BALANCED_8BIT,
            {**_BALANCED_8BIT, **_ONE_ROW},
        ),
        ranked=True,
    ),
    Method(
        key="apollo-mini",
        name="APOLLO-Mini",
        variants=(
            _APOLLO_MINI,
            {**_APOLLO_MINI, **_IN_BACKWARD},
            {**_APOLLO_MINI, **_IN_BACKWARD, **_ONE_ROW},
        ),
    ),
    Method(key="lora", name="LoRA", variants=(_LORA,)),
    Method(key="int8-lora", name="int8 LoRA", variants=({**_LORA, "quant.format": "int8"},)),
    Method(key="qlora", name="QLoRA", variants=({**_LORA, "quant.format": "nf4"},)),
    Method(
        key="streamed",
        name="QLoRA streamed",
        variants=({**_LORA, "quant.format": "nf4", "place.kind": "stream"},),
        learns_as="qlora",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method's plan; `error` instead of one where the words make no recipe."""

    method: Method
    plan: Plan | None
    num_tokens: int
    error: str = ""

    @property
    def fits(self) -> bool:
        """Whether device and host memory suffice, as far as budgets are known."""
        return self.plan is not None and fits(self.plan)

    @property
    def quality_loss(self) -> str:
        """The largest measured loss against the reference, that it is one, or that there is
        none."""
        losses = losses_of(self.method.quality_key)
        if not losses:
            return REFERENCE if is_reference(self.method.key) else NOT_MEASURED
        return max(losses, key=lambda loss: loss.amount).words

    @property
    def runs(self) -> list[ReferenceRun]:
        """Stored runs of the method."""
        return runs_of(self.method.quality_key)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; the recipe in full, so that it can be run."""
        made, speed = self.plan, None if self.plan is None else self.plan.speed
        values: dict[str, Any] = {
            "method": self.method.key,
            "name": self.method.name,
            "fits": self.fits,
            "error": self.error or None,
            "num_tokens": self.num_tokens,
            "quality_loss": self.quality_loss,
            "quality_runs": [vars(run) for run in self.runs],
        }
        if made is not None:
            values |= {
                "device_bytes": made.device_bytes,
                "host_bytes": made.host_bytes,
                "peak_phase": made.peak.name,
                "recipe": made.recipe.model_dump(mode="json", exclude_defaults=True),
            }
        if speed is not None:
            values |= {
                "tokens_per_s": speed.tokens_per_s,
                "limiter": speed.limiter,
                "hours": speed.hours(self.num_tokens),
                "kwh": speed.energy_kwh(self.num_tokens),
                "usd": speed.cost_usd(self.num_tokens),
            }
        return values


def compare(
    model: str,
    words: Sequence[str] = (),
    *,
    architecture: Architecture,
    hardware: Hardware | None,
    devices: Devices,
    on_cpu: bool = False,
    methods: Sequence[Method] = METHODS,
) -> list[Row]:
    """A row for each method, in the table's order.

    `words`: settings for all of them, as on the command line; they win over the method's own.
    Raises ConfigError when no method can be planned.
    """
    planner = Planner(architecture=architecture, hardware=hardware, on_cpu=on_cpu, devices=devices)
    card_bytes = None if hardware is None or on_cpu else hardware.memory_bytes
    rows = [
        _row(model, words, method, planner=planner, card_bytes=card_bytes) for method in methods
    ]
    if all(row.plan is None for row in rows):
        raise ConfigError(rows[0].error)
    return rows


def fits(made: Plan) -> bool:
    """Whether a plan's device and host memory are within the budgets that it knows."""
    ram = made.recipe.place.ram
    return made.fits() and (ram is None or made.host_bytes <= parse_bytes(ram))


def _row(
    model: str, words: Sequence[str], method: Method, *, planner: Planner, card_bytes: int | None
) -> Row:
    """The method's fastest plan that fits, of its first variant that does; else its smallest."""
    best: Plan | None = None
    error = ""
    for variant in method.variants:
        try:
            recipe = _recipe(model, words, method, variant, setting=planner.setting)
            budget = _budget(recipe, card_bytes)
            made = _fitted(recipe, planner, budget)
        except (ConfigError, PlanError) as failure:
            error = error or str(failure)
            continue
        if best is None or made.device_bytes < best.device_bytes:
            best = made
        if budget.fits(made):
            best = made
            break
    tokens = DEFAULT_TOKENS if best is None else best.recipe.train.max_tokens or DEFAULT_TOKENS
    return Row(method=method, plan=best, num_tokens=tokens, error="" if best else error)


def _budget(recipe: Recipe, card_bytes: int | None) -> Budget:
    """What the words and the card leave; without either, nothing is held against anything."""
    ram = recipe.place.ram
    if card_bytes is None and recipe.place.vram is None:
        return Budget(device_bytes=None, host_bytes=None if ram is None else parse_bytes(ram))
    return budget_of(recipe, device_bytes=card_bytes, host_bytes=None)


def _fitted(recipe: Recipe, planner: Planner, budget: Budget) -> Plan:
    """What `fit` finds; the smallest that there is where nothing fits."""
    try:
        found = search(
            recipe,
            architecture=planner.architecture,
            hardware=planner.hardware,
            on_cpu=planner.on_cpu,
            devices=planner.devices,
            budget=budget,
        )
    except PlanError:
        least = smallest(starting(recipe, planner.devices), planner, budget)
        if least is None:
            raise
        return least
    return replace(found.plan, recipe=found.recipe)


def _recipe(
    model: str, words: Sequence[str], method: Method, variant: Words, *, setting: Setting
) -> Recipe:
    """The method's recipe, its own words fixed and all others free; a shape without weights stands
    for a model that has them."""
    total = setting.devices.total
    base: dict[str, Any] = {
        "model.path": "shape" if is_builtin(model) else model,
        "fit.batch_rows": -(-DEFAULT_ROWS // total) * total,
    }
    if "train.micro_batch_size" in variant:
        base["fit.batch_rows"] = total
    if method.ranked:
        base["optim.rank"] = max(1, setting.architecture.sizes.hidden // RANK_SHARE)
    recipe = load_recipe(None, words, base=_nested({**base, **variant}))
    return override(recipe, {"model.path": model})


def _nested(words: Words) -> dict[str, Any]:
    sections: dict[str, Any] = {}
    for path, value in words.items():
        section, _, key = path.partition(".")
        sections.setdefault(section, {})[key] = value
    return sections
