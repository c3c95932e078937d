"""Weights that are not kept as floats: how the optimiser reads and writes some rows of one.

A parameter may be a mere stand-in that takes gradients while its values are INT8 codes with scales.
`keep_int8_` tells the optimiser, which then updates the codes by rows: a float copy exists of a
chunk of rows and never of the matrix, on CUDA not even that (arXiv 2407.08296). Rounding is always
stochastic here; to nearest, almost every update would be lost.

Only for projected matrices: what is small enough to follow the plain rule may stay float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nibble.errors import ConfigError
from nibble.kernels.steps import step_kernels
from nibble.numerics import int8_weights
from nibble.optim.noise import Address, Noise
from nibble.optim.optimizer import Optimizer
from nibble.optim.projected_step import Terms
from nibble.optim.update import move_


@dataclass(frozen=True, kw_only=True)
class Int8Store:
    """The codes int8 [out, in] and scales float32 [out, groups] of one weight."""

    codes: Tensor
    scales: Tensor

    def move_(
        self,
        rows: slice,
        terms: Terms,
        *,
        group: dict[str, Any],
        scale: float,
        noise: Noise,
        address: Address,
    ) -> None:
        """Step some rows: (1 - decay) W - rate U, rounded at random."""
        codes, scales = self.codes[rows], self.scales[rows]
        kernels = step_kernels(codes.device.type)
        if kernels is not None:
            rate = float(group["lr"])
            kernels.move_int8_(
                codes,
                scales,
                None if terms.update is None else terms.update.contiguous(),
                rate=rate * scale,
                decay=rate * group["weight_decay"],
                decay_last=group["decay_last"],
                key=noise.key,
                place=address.place,
                grad=None if terms.grad is None else terms.grad.contiguous(),
                factor=terms.factor,
            )
            return
        values = int8_weights.decode(codes, scales, dtype=torch.float32)
        move_([values], [terms.total()], group=group, noise=None, scale=scale)
        numbers = address.numbers(values.numel(), device=values.device)
        made = int8_weights.encode(values, bits=noise.bits(numbers).view_as(values))
        codes.copy_(made[0])
        scales.copy_(made[1])


def keep_int8_(optimizer: Optimizer, stores: Mapping[Tensor, Int8Store]) -> None:
    """Let `optimizer` update the codes of these parameters in place of their own values.

    Raises ConfigError for a parameter that is not of this optimiser or that it does not project.
    """
    projected = {
        weight
        for index in range(len(optimizer.param_groups))
        for weight in optimizer.projections(index)
    }
    for weight, store in stores.items():
        if weight not in projected:
            raise ConfigError(
                f"an INT8 weight of shape {list(weight.shape)} is not projected by the optimiser: "
                "put it in a group with a rank that fits, or keep it float"
            )
        if store.codes.shape != weight.shape:
            raise ConfigError(
                f"INT8 codes of shape {list(store.codes.shape)} do not fit a parameter of shape "
                f"{list(weight.shape)}: give each parameter its own codes"
            )
    if any(group["parameter_scale"] > 0 for group in optimizer.param_groups):
        raise ConfigError("parameter_scale looks at float weights: leave it out with INT8 weights")
    optimizer.stores.update(stores)
