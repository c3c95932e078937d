"""The two halves of every step: state advances by its rule, and weights move.

`advance` is where rule and codec meet; it neither knows whether a gradient was projected before
nor what becomes of its updates. `move_` is

    W <- (1 - lr * weight_decay) * W - lr * scale * U                 (decay_last: U decays too)

in float32, rounded to the weights' type, stochastically with noise. With `parameter_scale` the
learning rate is multiplied by max(parameter_scale, rms(W)) for each weight, as Adafactor proposes
(arXiv 1804.04235, section 8).

Small tensors share the launches of lists. A tensor of FUSED_NUMEL elements or more has a kernel to
itself where there is one (kernels/steps.py): one launch and one pass instead of a dozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nibble.kernels.steps import StepKernels, step_kernels
from nibble.numerics.updates import RULES, Hyper, Split
from nibble.optim.batches import FUSED_NUMEL, Kind
from nibble.optim.noise import Address, Noise, noise_for
from nibble.optim.shards import ShardView
from nibble.optim.states import Stored, as_float32, store_rounded_, unpack, write_back_
from nibble.spec.state import Slot

SlotAddress = Callable[[Slot], Address]
"""Which numbers the elements of a parameter's slot have."""


def advance(
    grads: list[Tensor],
    states: list[dict[str, Any]],
    *,
    group: dict[str, Any],
    kind: Kind,
    noise: Noise | None = None,
    addresses: Sequence[SlotAddress] = (),
    lengths: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Updates that the group's rule makes of gradients; states advance.

    `noise` rounds bf16 state, at the `addresses` of its elements. `lengths`: of the wholes of
    gradients that are cut along `kind.dim`. Updates are float32, or at once of `dtype` where a
    kernel makes them. Gradients are of one type.
    """
    kernels = step_kernels(kind.device.type) if group["rule"] == "adamw" else None
    alone = [
        kernels is not None and grad.numel() >= FUSED_NUMEL and grad.is_contiguous()
        for grad in grads
    ]
    updates: list[Tensor | None] = [None] * len(grads)
    together = [index for index, own in enumerate(alone) if not own]
    for index, own in enumerate(alone):
        if own and kernels is not None:
            at = addresses[index] if noise is not None else None
            updates[index] = _adamw(
                kernels, grads[index], states[index], group, kind, noise, at, dtype
            )
    if together:
        made = _advance_lists(
            as_float32([grads[index] for index in together]).views,
            [states[index] for index in together],
            group=group,
            kind=kind,
            noise=noise,
            addresses=[addresses[index] for index in together] if noise is not None else (),
            lengths=[lengths[index] for index in together] if lengths else (),
        )
        for index, update in zip(together, made, strict=True):
            updates[index] = update
    return [update for update in updates if update is not None]


def hyper_of(group: dict[str, Any], kind: Kind) -> Hyper:
    """A group's numbers for one step."""
    return Hyper(
        step=kind.step,
        betas=tuple(group["betas"]),
        eps=group["eps"],
        momentum=group["momentum"],
        bias_correction=group["bias_correction"],
    )


def _adamw(
    kernels: StepKernels,
    grad: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    kind: Kind,
    noise: Noise | None,
    address: SlotAddress | None,
    dtype: torch.dtype,
) -> Tensor:
    """One large parameter's update by a kernel."""
    hyper = hyper_of(group, kind)
    mean, square = (tuple(state[name] for name in kind.stored_names(slot)) for slot in kind.slots)
    correction, eps = hyper.denominator()
    update = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    keys, place = None, (0, 0, 0, 0)
    if noise is not None and address is not None:
        keys = (noise.of(0).key, noise.of(1).key)
        place = address(kind.slots[0]).place
    kernels.adamw_(
        grad,
        mean,
        square,
        update,
        betas=hyper.betas,
        correction=correction,
        eps=eps,
        keys=keys,
        place=place,
    )
    return update


def advance_slice(
    update: Tensor,
    state: dict[str, Any],
    *,
    group: dict[str, Any],
    kind: Kind,
    noise: Noise | None,
    address: SlotAddress,
) -> Tensor:
    """What becomes of a slice of Adafactor's update where its rule keeps a running mean of it."""
    for number, slot in enumerate(kind.slots):
        if slot.extent != "full":
            continue
        stored: list[Stored] = [tuple(state[name] for name in kind.stored_names(slot))]
        mean = unpack(stored, slot=slot)
        mean.views[0].lerp_(update, 1 - group["betas"][0])
        own = None if noise is None else noise.of(number)
        write_back_(stored, values=mean, slot=slot, noise=own, addresses=[address(slot)])
        update = mean.views[0]
    return update


def _advance_lists(
    grads: list[Tensor],
    states: list[dict[str, Any]],
    *,
    group: dict[str, Any],
    kind: Kind,
    noise: Noise | None,
    addresses: Sequence[SlotAddress],
    lengths: Sequence[int],
) -> list[Tensor]:
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
        hyper=hyper_of(group, kind),
        **split,
    )
    for number, (slot, own) in enumerate(values.items()):
        write_back_(
            stored[slot],
            values=own,
            slot=slot,
            noise=None if noise is None else noise.of(number),
            addresses=[address(slot) for address in addresses],
        )
    return updates


def move_(
    targets: list[Tensor],
    updates: list[Tensor],
    *,
    group: dict[str, Any],
    noise: Noise | None,
    addresses: Sequence[Address] = (),
    scale: float = 1.0,
    factors: list[Tensor] | None = None,
) -> None:
    """Apply updates to weights; `noise` rounds bf16 weights at the `addresses` of their elements.

    `factors` are scalars, one a weight, that multiply the learning rate.
    """
    learning_rate = float(group["lr"])
    decay = learning_rate * group["weight_decay"]
    kernels = step_kernels(targets[0].device.type)
    together = []
    for index, target in enumerate(targets):
        if kernels is None or target.numel() < FUSED_NUMEL or not target.is_contiguous():
            together.append(index)
            continue
        kernels.move_(
            target,
            updates[index].contiguous(),
            rate=learning_rate * scale,
            decay=decay,
            decay_last=group["decay_last"],
            key=None if noise is None else noise.key,
            place=(0, 0, 0, 0) if noise is None else addresses[index].place,
            share=None if factors is None else factors[index],
        )
    if not together:
        return
    some = [updates[index] for index in together]
    shares = None if factors is None else [factors[index] for index in together]
    if some[0].dtype != torch.float32:
        some = as_float32(some).views
    if shares is not None:
        some = list(torch._foreach_mul(some, shares))
    small = [targets[index] for index in together]
    weights = as_float32(small)
    if not group["decay_last"]:
        _decay_(weights.views, decay, shares)
    torch._foreach_add_(weights.views, some, alpha=-learning_rate * scale)
    if group["decay_last"]:
        _decay_(weights.views, decay, shares)
    if weights.flat is not None:
        at = [addresses[index] for index in together] if noise is not None else ()
        store_rounded_(small, flat=weights.flat, noise=noise, addresses=at)


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


def weight_noise(group: dict[str, Any], kind: Kind, *, index: int) -> Noise | None:
    """Noise of the weights of one group in one step, the same whenever that step is taken again.

    None where they are not rounded stochastically.
    """
    return noise_for(group["seed"], index, kind.step, 0) if rounds_weights(group, kind) else None


def state_noise(group: dict[str, Any], kind: Kind, *, index: int) -> Noise | None:
    """Noise of bf16 state, likewise."""
    if group["codec"] != "bf16" or not kind.slots:
        return None
    return noise_for(group["seed"], index, kind.step, 1)
