"""What can be chosen about a run, one row each: the space of `fit: auto`, and the source of advice.

A choice is a name, the word of `fit.allow` that it needs (none for what leaves the mathematics
alone), and the values it may take for a recipe: each a mapping of settings, the gentlest first,
among them what the recipe has. Rows are tried one by one (advice.py), side by side (the table of a
found plan) and all together (search.py); so what is advised is what is searched.

Two settings are counts for which memory buys time, `train.keep_blocks` and `place.resident_blocks`;
they are rows of COUNTS. A value is legal if no contradiction holds under it, if it leaves alone
what was given (spec/given.py) and makes nothing given idle. Words and integers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nibble.spec.config import Recipe
from nibble.spec.contradictions import CONTRADICTIONS
from nibble.spec.effects import EFFECT
from nibble.spec.given import ALLOWED, value_of
from nibble.spec.holdings import Devices, placement_kind

if TYPE_CHECKING:
    from nibble.spec.arch import Architecture

Overrides = dict[str, Any]
MIN_CHUNK_TOKENS, MIN_TILE_TOKENS, MAX_TILE_TOKENS = 256, 1024, 8192
MIN_RANK, MIN_PROJECTION_RANK = 8, 32
FORMATS = ("none", "int8", "nf4")
"""Formats of the base that `fit.allow: [format]` chooses among: from most to least exact."""
LAYERWISE: Overrides = {
    "optim.name": "adamw",
    "optim.method": "galore8bit",
    "optim.layerwise": True,
    "optim.basis_storage": "bf16",
}
"""Low-rank gradients as the built-in recipe `galore` has them."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a recipe is to run: the model's shape, the devices, whether they are GPUs."""

    architecture: Architecture
    devices: Devices
    on_cpu: bool


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A row: `values` of a recipe, the gentlest first. `allow`: the word of `fit.allow` it needs.

    `saves`: it only ever trades time for memory, so a search looks at it last. `searched`: rows
    that are not are only advised.
    """

    name: str
    paths: tuple[str, ...]
    values: Callable[[Recipe, Setting], Iterable[Overrides]]
    allow: str | None = None
    saves: bool = False
    searched: bool = True


def override(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe with `section.key` values replaced; they are taken to be of the right type."""
    sections: dict[str, dict[str, Any]] = {}
    for path, value in overrides.items():
        section, _, key = path.partition(".")
        sections.setdefault(section, {})[key] = value
    return recipe.model_copy(
        update={
            name: getattr(recipe, name).model_copy(update=values)
            for name, values in sections.items()
        }
    )


def present(recipe: Recipe, choice: Choice) -> Overrides:
    """What the recipe has of a choice."""
    return {path: value_of(recipe, path) for path in choice.paths}


def differs(recipe: Recipe, overrides: Mapping[str, Any]) -> bool:
    """Whether the values are others than the recipe's."""
    return any(value_of(recipe, path) != value for path, value in overrides.items())


def fixed_paths(recipe: Recipe) -> tuple[str, ...]:
    """Settings that nothing may change."""
    return () if recipe.fit is None else recipe.fit.fixed


def is_free(recipe: Recipe, choice: Choice) -> bool:
    """Whether the recipe lets `fit` make this choice at all."""
    allowed = () if recipe.fit is None else recipe.fit.allow
    return choice.searched and (choice.allow is None or choice.allow in allowed)


def refusal_of(recipe: Recipe, changed: Recipe) -> str | None:
    """Why a changed recipe is not legal beside the recipe that it comes from; None if it is."""
    for path in fixed_paths(recipe):
        if value_of(recipe, path) != value_of(changed, path):
            return f"you gave {path}"
    for rule in EFFECT:
        if rule.path in fixed_paths(recipe) and not rule.where(changed) and rule.where(recipe):
            return f"you gave {rule.path}"
    for contradiction in CONTRADICTIONS:
        if contradiction.holds(changed) and not contradiction.holds(recipe):
            return contradiction.message(changed)
    return None


def _placements(recipe: Recipe, setting: Setting) -> Iterator[Overrides]:
    """The recipe's own, then copies or shards on all devices, then weights from the host."""
    kind, shard = recipe.place.kind, recipe.place.shard
    yield {"place.kind": kind, "place.shard": shard}
    if kind == "fsdp" and shard != "hybrid":
        yield {"place.kind": "fsdp", "place.shard": "full" if shard == "grad-op" else "grad-op"}
    if setting.on_cpu or kind in ("dp", "deepspeed"):
        return
    if kind in ("fsdp", "stream"):
        yield {"place.kind": "auto", "place.shard": "full"}
    if setting.devices.total > 1 and kind != "fsdp":
        yield {"place.kind": "fsdp", "place.shard": "full"}
        yield {"place.kind": "fsdp", "place.shard": "grad-op"}
    if kind != "stream" and recipe.adapter.kind != "factorised":  # nothing of it is frozen
        yield {"place.kind": "stream", "place.shard": "full"}


def rows_per_device(recipe: Recipe) -> int:
    """Rows of one update on one device."""
    return recipe.train.micro_batch_size * recipe.train.gradient_accumulation_steps


def _halves(path: str) -> Callable[[Recipe, Setting], Iterator[Overrides]]:
    """Less and less of a count, down to none."""

    def values(recipe: Recipe, setting: Setting) -> Iterator[Overrides]:
        del setting
        count = value_of(recipe, path)
        yield {path: count}
        while count != "auto" and count > 0:
            count //= 2
            yield {path: count}

    return values


def _rows(recipe: Recipe, setting: Setting) -> Iterator[Overrides]:
    """Divisors of the rows of an update, the largest first: the same update, more launches."""
    del setting
    rows = rows_per_device(recipe)
    yield from (
        {"train.micro_batch_size": n, "train.gradient_accumulation_steps": rows // n}
        for n in range(rows, 0, -1)
        if rows % n == 0
    )


def _policies(recipe: Recipe, setting: Setting) -> Iterator[Overrides]:
    """What blocks keep for backward; `none` leaves no blocks to count and nothing to move."""
    del setting
    dp = recipe.place.kind == "dp"
    for policy in ("none", "selective", "full"):
        if policy == "selective" and dp:
            continue  # copies cannot follow it
        idle = {"train.keep_blocks": 0, "train.activation_offload": False}
        yield {
            "train.activation_checkpointing": policy,
            **(idle if policy == "none" else {}),
        }


def _offload(recipe: Recipe, setting: Setting) -> Iterator[Overrides]:
    yield {"train.activation_offload": False}
    if (
        recipe.train.activation_checkpointing != "none"
        and recipe.place.kind != "dp"
        and not setting.on_cpu
    ):
        yield {"train.activation_offload": True}


def _chunks(recipe: Recipe, setting: Setting) -> Iterator[Overrides]:
    del setting
    chunk = recipe.train.loss_chunk_tokens
    yield {"train.loss_chunk_tokens": chunk}
    if recipe.model.task != "causal-lm":
        return
    while chunk > MIN_CHUNK_TOKENS:
        chunk = max(chunk // 2, MIN_CHUNK_TOKENS)
        yield {"train.loss_chunk_tokens": chunk}


def _tiles(recipe: Recipe, setting: Setting) -> Iterator[Overrides]:
    given = recipe.train.mlp_tile_tokens
    yield {"train.mlp_tile_tokens": given}
    if setting.architecture.num_experts or recipe.place.kind == "dp":
        return
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    tile = MAX_TILE_TOKENS
    while tile >= MIN_TILE_TOKENS:
        if tile < min(tokens, given or tokens):
            yield {"train.mlp_tile_tokens": tile}
        tile //= 2


def _optimizer(recipe: Recipe, setting: Setting) -> Iterator[Overrides]:
    """8-bit states, of whichever rule is there."""
    del setting
    optim = recipe.optim
    yield {"optim.name": optim.name, "optim.state": optim.state}
    if optim.name == "adamw" and optim.method == "none" and optim.state != "8bit":
        yield {"optim.name": "adamw8bit", "optim.state": None}
    elif optim.name == "lion" and optim.state != "8bit":
        yield {"optim.name": "lion", "optim.state": "8bit"}


def _method(recipe: Recipe, setting: Setting) -> Iterator[Overrides]:
    """Low-rank gradients where everything is trained."""
    del setting
    optim = recipe.optim
    yield {path: value_of(recipe, path) for path in ALLOWED["method"]}
    plain = optim.name in ("adamw", "adamw8bit") and optim.method == "none" and optim.rank is None
    if recipe.adapter.kind == "none" and plain:
        yield dict(LAYERWISE)


def _formats(recipe: Recipe, setting: Setting) -> Iterator[Overrides]:
    del setting
    own = recipe.quant.format
    yield {"quant.format": own}
    if recipe.adapter.kind == "none" or own not in FORMATS:
        return
    yield from ({"quant.format": name} for name in FORMATS if name != own)


def _ranks(recipe: Recipe, setting: Setting) -> Iterator[Overrides]:
    """Halves of the adapter's rank, with alpha / rank as it was, or of the projection's."""
    del setting
    adapter, optim = recipe.adapter, recipe.optim
    if adapter.kind in ("lora", "dora"):
        rank, alpha = adapter.rank, adapter.alpha
        yield {"adapter.rank": rank, "adapter.alpha": alpha}
        while rank > MIN_RANK:
            rank, alpha = max(rank // 2, MIN_RANK), alpha * max(rank // 2, MIN_RANK) / rank
            yield {"adapter.rank": rank, "adapter.alpha": alpha}
    elif optim.method != "none" or optim.rank is not None:
        given = optim.rank
        yield {"optim.rank": given}
        rank = given or 128
        while optim.method != "apollo-mini" and rank > MIN_PROJECTION_RANK:
            rank = max(rank // 2, MIN_PROJECTION_RANK)
            yield {"optim.rank": rank}


def _lengths(recipe: Recipe, setting: Setting) -> Iterator[Overrides]:
    del setting
    length = recipe.data.max_length
    yield {"data.max_length": length}
    while length > 256:
        length = max(length // 2, 256)
        yield {"data.max_length": length}


def _adapters(recipe: Recipe, setting: Setting) -> Iterator[Overrides]:
    del setting
    yield {"adapter.kind": recipe.adapter.kind}
    if recipe.adapter.kind == "none" and not recipe.model.from_scratch:
        plain = {
            "optim.method": "none",
            "optim.rank": None,
            "optim.layerwise": False,
            "optim.in_backward": False,
            "optim.weights": "float",
        }
        idle = {path: value for path, value in plain.items() if value_of(recipe, path) != value}
        yield {"adapter.kind": "lora", **idle}
        yield {"adapter.kind": "lora", "quant.format": "nf4", **idle}


KEEP, RESIDENT = "train.keep_blocks", "place.resident_blocks"
POLICY = Choice(
    name="checkpointing",
    paths=("train.activation_checkpointing",),
    values=_policies,
)
ROWS = Choice(
    name="micro-batch",
    paths=("train.micro_batch_size", "train.gradient_accumulation_steps"),
    values=_rows,
)
CHUNK = Choice(name="loss chunk", paths=("train.loss_chunk_tokens",), values=_chunks, saves=True)
TILE = Choice(name="MLP tile", paths=("train.mlp_tile_tokens",), values=_tiles, saves=True)
OFFLOAD = Choice(name="offload", paths=("train.activation_offload",), values=_offload)
PLACEMENT = Choice(name="placement", paths=("place.kind", "place.shard"), values=_placements)
RANK = Choice(name="rank", paths=ALLOWED["rank"], values=_ranks, allow="rank")

CHOICES: tuple[Choice, ...] = (
    Choice(name="kept blocks", paths=(KEEP,), values=_halves(KEEP), searched=False),
    Choice(name="resident blocks", paths=(RESIDENT,), values=_halves(RESIDENT), searched=False),
    POLICY,
    ROWS,
    CHUNK,
    OFFLOAD,
    TILE,
    PLACEMENT,
    Choice(name="states", paths=ALLOWED["optimizer"], values=_optimizer, allow="optimizer"),
    Choice(name="format", paths=ALLOWED["format"], values=_formats, allow="format"),
    Choice(name="method", paths=ALLOWED["method"], values=_method, allow="method"),
    RANK,
    Choice(name="length", paths=("data.max_length",), values=_lengths, searched=False),
    Choice(name="adapter", paths=("adapter.kind",), values=_adapters, searched=False),
)
"""In the order in which they are advised: time first, then precision, then what is learnt."""


def counts(recipe: Recipe, setting: Setting) -> dict[str, int]:
    """The most of each count that is free under this recipe: kept blocks where activations are
    computed again, resident ones where weights are streamed."""
    blocks = setting.architecture.sizes.num_layers
    found = {}
    if recipe.train.activation_checkpointing != "none":
        found[KEEP] = blocks
    if placement_kind(recipe.place, setting.devices.total) == "stream":
        found[RESIDENT] = blocks
    return {path: most for path, most in found.items() if path not in fixed_paths(recipe)}
