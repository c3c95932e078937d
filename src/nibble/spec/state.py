"""Optimiser state: names, shapes, types and bytes of what each update rule keeps for a parameter.

A rule keeps *slots* (moments, momentum); a codec says how a slot is stored. Any rule goes with any
codec, so bytes are a sum over slots:

    adamw      exp_avg, exp_avg_sq               two of the parameter's shape
    lion       exp_avg                           one
    momentum   momentum_buffer                   one
    sgd        nothing
    adafactor  exp_avg_sq_row, exp_avg_sq_col    shape less its last, less its last but one dim;
               exp_avg_sq                        for vectors and scalars
    adafactor_momentum                           the same and exp_avg, of the parameter's shape

    fp32       4 bytes an element
    bf16       2 bytes
    8bit       1 byte and 4 bytes for each 256 elements (arXiv 2110.02861); a slot of fewer than
               4096 elements stays fp32, as in bitsandbytes

A projected parameter (spec/lowrank.py) has the slots of its projected gradient, a matrix, and what
the projection keeps: bases, a norm, similarities.

`optim/` allocates exactly these tensors and the planner adds up their bytes: one table for both.
Not here: gradients, master weights, and the step counters, which are plain numbers on the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

from nibble.errors import ConfigError
from nibble.spec.config import Optim
from nibble.spec.formats import TensorSpec
from nibble.spec.lowrank import METHODS, LowRank

BLOCK = 256
"""Elements of an 8-bit state that share one absmax."""
MIN_8BIT_NUMEL = 4096
"""Slots with fewer elements stay fp32 under the 8-bit codec."""
CODECS = ("fp32", "bf16", "8bit")

Extent = Literal["full", "rows", "columns"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Slot:
    """One quantity that a rule keeps; `signed` says whether its values may be negative.

    Slots are rows of a table and compare by identity: they key dicts in the optimiser's inner loop.
    """

    name: str
    signed: bool
    extent: Extent = "full"

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the slot for a parameter of `shape`."""
        if self.extent == "rows":
            return shape[:-1]
        if self.extent == "columns":
            return (*shape[:-2], shape[-1])
        return shape


@dataclass(frozen=True, kw_only=True)
class RuleSlots:
    """Slots of a rule for matrices (two dims or more) and for vectors."""

    matrix: tuple[Slot, ...]
    vector: tuple[Slot, ...]


_EXP_AVG = Slot(name="exp_avg", signed=True)
_EXP_AVG_SQ = Slot(name="exp_avg_sq", signed=False)
_MOMENTUM = Slot(name="momentum_buffer", signed=True)
_ROW = Slot(name="exp_avg_sq_row", signed=False, extent="rows")
_COLUMN = Slot(name="exp_avg_sq_col", signed=False, extent="columns")

RULES: dict[str, RuleSlots] = {
    "adamw": RuleSlots(matrix=(_EXP_AVG, _EXP_AVG_SQ), vector=(_EXP_AVG, _EXP_AVG_SQ)),
    "sgd": RuleSlots(matrix=(), vector=()),
    "momentum": RuleSlots(matrix=(_MOMENTUM,), vector=(_MOMENTUM,)),
    "adafactor": RuleSlots(matrix=(_ROW, _COLUMN), vector=(_EXP_AVG_SQ,)),
    "adafactor_momentum": RuleSlots(
        matrix=(_ROW, _COLUMN, _EXP_AVG), vector=(_EXP_AVG_SQ, _EXP_AVG)
    ),
    "lion": RuleSlots(matrix=(_EXP_AVG,), vector=(_EXP_AVG,)),
}

_RECIPE_NAMES = {
    "adamw": ("adamw", "fp32"),
    "adamw8bit": ("adamw", "8bit"),
    "sgd": ("sgd", "fp32"),
    "adafactor": ("adafactor", "fp32"),
    "adafactor-momentum": ("adafactor_momentum", "fp32"),
    "lion": ("lion", "fp32"),
}


def rule_and_codec(optim: Optim) -> tuple[str, str]:
    """Rule and codec that a recipe's `optim` section means; `sgd` with momentum is its own rule.

    The codec is `optim.state` where that is given, else the method's or the name's.
    """
    rule, codec = _RECIPE_NAMES[optim.name]
    if rule == "sgd" and optim.momentum > 0:
        rule = "momentum"
    codec = METHODS.get(optim.method, {}).get("codec", codec)
    return rule, optim.state or codec


def slots(rule: str, *, num_dims: int) -> tuple[Slot, ...]:
    """Slots that `rule` keeps for a parameter of `num_dims` dims.

    Raises ConfigError for an unknown rule.
    """
    if rule not in RULES:
        raise ConfigError(f"unknown update rule {rule!r}: use one of {', '.join(RULES)}")
    return RULES[rule].matrix if num_dims >= 2 else RULES[rule].vector


def stored_as(codec: str, numel: int) -> str:
    """The codec that a slot of `numel` elements really gets: small slots are not worth 8 bits.

    Raises ConfigError for an unknown codec.
    """
    if codec not in CODECS:
        raise ConfigError(f"unknown state codec {codec!r}: use one of {', '.join(CODECS)}")
    return "fp32" if codec == "8bit" and numel < MIN_8BIT_NUMEL else codec


def slot_tensors(
    slot: Slot, *, codec: str, shape: tuple[int, ...], whole: tuple[int, ...] | None = None
) -> dict[str, TensorSpec]:
    """Tensors that store `slot` for a parameter of `shape`, by the names they have in the state.

    `whole`: the shape of which this is a part; it says whether 8 bits are worth it, so that all who
    hold parts store them alike.
    """
    own = slot.shape(shape)
    stored = stored_as(codec, prod(slot.shape(shape if whole is None else whole)))
    if stored == "8bit":
        num_blocks = -(-prod(own) // BLOCK)
        return {
            f"{slot.name}_codes": TensorSpec(shape=own, dtype="uint8"),
            f"{slot.name}_absmax": TensorSpec(shape=(num_blocks,), dtype="float32"),
        }
    return {slot.name: TensorSpec(shape=own, dtype="bfloat16" if stored == "bf16" else "float32")}


def state_tensors(
    rule: str,
    *,
    codec: str,
    shape: tuple[int, ...],
    low_rank: LowRank | None = None,
    whole: tuple[int, ...] | None = None,
) -> dict[str, TensorSpec]:
    """All state tensors of a parameter of `shape`, by name.

    `low_rank` is its group's projection, which a parameter too small for it does not have.
    `whole`: as in `slot_tensors`, for a parameter that is not projected.
    """
    tensors: dict[str, TensorSpec] = {}
    own = shape
    if low_rank is not None and low_rank.projects(shape):
        tensors |= low_rank.tensors(shape)
        own = low_rank.projected_shape(shape)
    for slot in slots(rule, num_dims=len(own)):
        tensors |= slot_tensors(slot, codec=codec, shape=own, whole=whole)
    return tensors


def state_nbytes(codec: str, numel: int) -> int:
    """Exact bytes of one slot of `numel` elements."""
    flat = slot_tensors(Slot(name="state", signed=True), codec=codec, shape=(numel,))
    return sum(spec.nbytes for spec in flat.values())


def optimizer_nbytes(
    rule: str,
    *,
    codec: str,
    shapes: Iterable[tuple[int, ...]],
    low_rank: LowRank | None = None,
) -> int:
    """Exact bytes of the state of parameters of these shapes, each as the optimiser sees it."""
    return sum(
        spec.nbytes
        for shape in shapes
        for spec in state_tensors(rule, codec=codec, shape=shape, low_rank=low_rank).values()
    )
