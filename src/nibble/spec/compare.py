"""One row a method: what training a model by it needs on a card, how fast, for how much.

Idea. A method is a few words of a recipe. Each is planned on the same model, rows and budget, with
everything else chosen for it: micro-batch, checkpointing, placement, as `fit` chooses for a run.
What a row costs is `plan.py`'s arithmetic; what it learns comes from stored runs (`quality.py`),
and where there is none it says so.

It compares plans, not runs: bytes and seconds are estimates of one model, quality is measured on
others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nibble.errors import ConfigError, PlanError
from nibble.spec.advice import apply
from nibble.spec.arch import Architecture
from nibble.spec.builtin_models import is_builtin
from nibble.spec.config import Recipe
from nibble.spec.decide import decide
from nibble.spec.hardware import Hardware
from nibble.spec.holdings import Devices
from nibble.spec.load import load_recipe
from nibble.spec.plan import Plan, plan
from nibble.spec.quality import NOT_MEASURED, ReferenceRun, losses_of, runs_of
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


_LORA: Words = {"adapter.kind": "lora"}
_GALORE: Words = {"optim.layerwise": True, "optim.basis": "randomised"}
_IN_BACKWARD: Words = {
    "optim.in_backward": True,
    "optim.max_grad_norm": None,
    "train.gradient_accumulation_steps": 1,
}
"""No gradient of a matrix is kept, so an update is one pass."""
_GALORE_8BIT: Words = {
    **_GALORE,
    "optim.method": "galore8bit",
    "optim.basis_storage": "bf16",
}
_APOLLO_MINI: Words = {"optim.method": "apollo-mini"}
METHODS: tuple[Method, ...] = (
    Method(key="full", name="full", variants=({}, {"optim.name": "adamw8bit"})),
    Method(
        key="galore",
        name="GaLore 8 bit",
        variants=(_GALORE_8BIT, {**_GALORE_8BIT, **_IN_BACKWARD}),
        ranked=True,
    ),
    Method(
        key="q-galore",
        name="Q-GaLore",
        variants=({**_GALORE, "optim.method": "q-galore", "optim.weights": "int8"},),
        ranked=True,
    ),
    Method(
        key="apollo-mini",
        name="APOLLO-Mini",
        variants=(_APOLLO_MINI, {**_APOLLO_MINI, **_IN_BACKWARD}),
    ),
    Method(key="lora", name="LoRA", variants=(_LORA,)),
    Method(key="int8-lora", name="int8 LoRA", variants=({**_LORA, "quant.format": "int8"},)),
    Method(key="qlora", name="QLoRA", variants=({**_LORA, "quant.format": "nf4"},)),
    Method(
        key="streamed",
        name="QLoRA streamed",
        variants=({**_LORA, "quant.format": "nf4", "place.kind": "stream"},),
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
        """The largest measured loss against the reference, or that there is none."""
        losses = losses_of(self.method.key)
        if not losses:
            return NOT_MEASURED
        return max(losses, key=lambda loss: loss.amount).words

    @property
    def runs(self) -> list[ReferenceRun]:
        """Stored runs of the method."""
        return runs_of(self.method.key)

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
    rows = [
        _row(model, words, method, architecture=architecture, hardware=hardware,
             devices=devices, on_cpu=on_cpu)
        for method in methods
    ]  # fmt: skip
    if all(row.plan is None for row in rows):
        raise ConfigError(rows[0].error)
    return rows


def fits(made: Plan) -> bool:
    """Whether a plan's device and host memory are within the budgets that it knows."""
    ram = made.recipe.place.ram
    return made.fits() and (ram is None or made.host_bytes <= parse_bytes(ram))


def _row(
    model: str,
    words: Sequence[str],
    method: Method,
    *,
    architecture: Architecture,
    hardware: Hardware | None,
    devices: Devices,
    on_cpu: bool,
) -> Row:
    """The method's fastest plan that fits, of its first variant that does; else its smallest."""
    best: Plan | None = None
    error = ""
    for variant in method.variants:
        try:
            start = _recipe(model, words, method, variant, width=architecture.sizes.hidden)
            made = _fitted(
                start, architecture=architecture, hardware=hardware, devices=devices, on_cpu=on_cpu
            )
        except (ConfigError, PlanError) as failure:
            error = error or str(failure)
            continue
        if best is None or made.device_bytes < best.device_bytes:
            best = made
        if fits(made):
            best = made
            break
    tokens = DEFAULT_TOKENS if best is None else best.recipe.train.max_tokens or DEFAULT_TOKENS
    return Row(method=method, plan=best, num_tokens=tokens, error="" if best else error)


def _recipe(
    model: str, words: Sequence[str], method: Method, variant: Words, *, width: int
) -> Recipe:
    """The method's recipe; a shape without weights stands for a model that has them."""
    base: dict[str, Any] = {
        "model.path": "shape" if is_builtin(model) else model,
        "train.gradient_accumulation_steps": DEFAULT_ROWS,
    }
    if method.ranked:
        base["optim.rank"] = max(1, width // RANK_SHARE)
    recipe = load_recipe(None, words, base=_nested({**base, **variant}))
    return apply(recipe, {"model.path": model})


def _nested(words: Words) -> dict[str, Any]:
    sections: dict[str, Any] = {}
    for path, value in words.items():
        section, _, key = path.partition(".")
        sections.setdefault(section, {})[key] = value
    return sections


def _fitted(
    recipe: Recipe,
    *,
    architecture: Architecture,
    hardware: Hardware | None,
    devices: Devices,
    on_cpu: bool,
) -> Plan:
    """The fastest choice of micro-batch, checkpointing and placement that fits, else the least."""
    plans = []
    error: ConfigError | None = None
    for changes in _choices(recipe, devices):
        try:
            wanted = apply(recipe, changes)
            made = decide(
                wanted,
                architecture=architecture,
                hardware=hardware,
                on_cpu=on_cpu,
                devices=devices,
            )
            plans.append(
                plan(
                    made,
                    architecture=architecture,
                    hardware=hardware,
                    on_cpu=on_cpu,
                    devices=devices,
                )
            )
        except ConfigError as failure:
            error = failure
    if not plans:
        raise error or ConfigError("no choice of micro-batch and placement is left")
    fitting = [made for made in plans if fits(made)]
    if not fitting:
        return min(plans, key=lambda made: made.device_bytes)
    return max(
        fitting, key=lambda made: (made.speed.tokens_per_s if made.speed else 0, -made.device_bytes)
    )


def _choices(recipe: Recipe, devices: Devices) -> Iterator[dict[str, Any]]:
    """Micro-batches whose passes make the same update, how much is computed again, placements."""
    train = recipe.train
    rows = train.micro_batch_size * train.gradient_accumulation_steps
    share = max(1, rows // devices.total)
    kinds = [recipe.place.kind]
    if recipe.place.kind == "auto" and devices.total > 1:
        kinds = ["ddp", "fsdp"]
    micro = 1
    while micro <= share:
        for kind in kinds:
            for again in ("full", "selective"):
                yield {
                    "place.kind": kind,
                    "train.micro_batch_size": micro,
                    "train.gradient_accumulation_steps": -(-share // micro),
                    "train.activation_checkpointing": again,
                    "train.keep_blocks": "auto",
                }
        micro *= 2
