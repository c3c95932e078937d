"""The two halves of every step: state advances by its rule, and weights move.

`advance` is where rule and codec meet; it neither knows whether a gradient was projected before
nor what becomes of its updates. `move_` is

    W <- (1 - lr * weight_decay) * W - lr * scale * U                 (decay_last: U decays too)

in float32, rounded to the weights' type, stochastically with a generator. With `parameter_scale`
the learning rate is multiplied by max(parameter_scale, rms(W)) for each weight, as Adafactor
proposes (arXiv 1804.04235, section 8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nibble.numerics.updates import RULES, Hyper, Split
from nibble.optim.batches import Kind
from nibble.optim.noise import generator_for
from nibble.optim.shards import ShardView
from nibble.optim.states import Stored, as_float32, store_rounded_, unpack, write_back_
from nibble.spec.state import Slot


def advance(
    grads: list[Tensor],
    states: list[dict[str, Any]],
    *,
    group: dict[str, Any],
    kind: Kind,
    generator: torch.Generator | None,
    lengths: Sequence[int] = (),
) -> list[Tensor]:
    """Updates, float32, that the group's rule makes of float32 gradients; states advance.

    `lengths`: of the wholes of gradients that are cut along `kind.dim`.
    """
    stored: dict[Slot, list[Stored]] = {}
    for slot in kind.slots:
        names = kind.stored_names(slot)
        stored[slot] = [tuple(state[name] for name in names) for state in states]
    values = {slot: unpack(tensors, slot=slot) for slot, tensors in stored.items()}
    split: dict[str, Any] = {}
    if kind.dim is not None and kind.sum_ is not None:
        split["split"] = Split(dim=kind.dim, lengths=lengths, sum_=kind.sum_)
    updates = RULES[group["rule"]].apply_(
        grads,
        states={slot.name: own.views for slot, own in values.items()},
        hyper=Hyper(
            step=kind.step,
            betas=tuple(group["betas"]),
            eps=group["eps"],
            momentum=group["momentum"],
            bias_correction=group["bias_correction"],
        ),
        **split,
    )
    for slot, own in values.items():
        write_back_(stored[slot], values=own, slot=slot, generator=generator)
    return updates


def move_(
    targets: list[Tensor],
    updates: list[Tensor],
    *,
    group: dict[str, Any],
    noise: torch.Generator | None,
    scale: float = 1.0,
    factors: list[Tensor] | None = None,
) -> None:
    """Apply float32 updates to weights; `noise` rounds bf16 weights stochastically.

    `factors` are scalars, one a weight, that multiply the learning rate.
    """
    learning_rate = float(group["lr"])
    decay = learning_rate * group["weight_decay"]
    if factors is not None:
        updates = list(torch._foreach_mul(updates, factors))
    weights = as_float32(targets)
    if not group["decay_last"]:
        _decay_(weights.views, decay, factors)
    torch._foreach_add_(weights.views, updates, alpha=-learning_rate * scale)
    if group["decay_last"]:
        _decay_(weights.views, decay, factors)
    if weights.flat is not None:
        store_rounded_(targets, flat=weights.flat, generator=noise)


def _decay_(weights: list[Tensor], decay: float, factors: list[Tensor] | None) -> None:
    if decay == 0:
        return
    if factors is None:
        torch._foreach_mul_(weights, 1 - decay)
    else:
        torch._foreach_mul_(weights, [1 - decay * factor for factor in factors])


def rate_factor(weight: Tensor, *, floor: float, view: ShardView | None = None) -> Tensor:
    """max(floor, rms of the weight), a float32 scalar; `view` says of what the weight is a part."""
    size = torch.linalg.vector_norm(weight, dtype=torch.float32)
    numel = weight.numel()
    if view is not None and view.dim is not None:
        square = size.square_()
        view.sum_([square])
        size, numel = square.sqrt_(), math.prod(view.shape)
    factor: Tensor = size.div_(math.sqrt(numel)).clamp_(min=floor)
    return factor


def rounds_weights(group: dict[str, Any], kind: Kind) -> bool:
    """Whether weights of this kind are rounded stochastically."""
    return bool(group["stochastic_rounding"]) and kind.weight_dtype == torch.bfloat16


def rounding_noise(
    group: dict[str, Any], kind: Kind, *, index: int, ordinal: int
) -> torch.Generator | None:
    """Noise of one kind of one group in one step, the same whenever that step is taken again.

    None where nothing is rounded stochastically.
    """
    if not (rounds_weights(group, kind) or (group["codec"] == "bf16" and kind.slots)):
        return None
    return generator_for(group["seed"], index, ordinal, kind.step, device=kind.device)
