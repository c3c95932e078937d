"""INT8 weights that are trained: symmetric codes with a scale for each 256 of a row.

    s = max |w| of a group / 127,     c = floor(w / s + u),     w' = c s

With u uniform in [0, 1) the rounding is stochastic and E[w'] = w, so that updates far below a step
s add up instead of being lost; with u = 1/2 it is to nearest, which is for packing once. Source:
Q-GaLore, arXiv 2407.08296, section 3.4.

Costs: float32 of as many rows as are given; give some at a time. It knows no modules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nibble.numerics.rounding import uniform
from nibble.spec.int8_weights import GROUP

LEVELS = 127
_TINY = torch.finfo(torch.float32).tiny


def encode(values: Tensor, *, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes int8 [rows, columns] and scales float32 [rows, groups] of `values`, any float type.

    Stochastically by 32 random `bits` an element (rounding.py), int32, else to nearest.
    """
    rows, columns = values.shape
    padded = torch.constant_pad_nd(values.float(), (0, -columns % GROUP)).view(rows, -1, GROUP)
    scales = padded.abs().amax(dim=2) / LEVELS
    steps = padded / scales.clamp(min=_TINY).unsqueeze(2)
    if bits is None:
        steps = steps.round()
    else:
        noise = torch.constant_pad_nd(uniform(bits), (0, -columns % GROUP)).view_as(steps)
        steps = steps.add_(noise).floor_()
    # The largest of a group is 127 but for rounding of the quotient.
    codes = steps.clamp_(-LEVELS, LEVELS).to(torch.int8)
    return codes.view(rows, -1)[:, :columns].contiguous(), scales


def decode(codes: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The weights of any rows, [rows, columns] in `dtype`."""
    each = scales.repeat_interleave(GROUP, dim=1)[:, : codes.shape[1]]
    return (codes * each).to(dtype)
