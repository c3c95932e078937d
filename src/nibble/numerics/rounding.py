"""Stochastic rounding to bfloat16: small updates that nearest rounding loses survive on average.

bfloat16 is the upper half of a float32. Add a uniform 16-bit integer to the float32's bits and cut
the lower half: the value goes to the neighbour above with the probability of its distance from the
one below, so E[round(x)] = x (used for weights in arXiv 2010.06192). A weight of 1 keeps
8 significant bits, so an update below 1/512 of it vanishes under nearest rounding, for ever.

Costs one int32 tensor of noise. A fixed generator gives fixed bits. It is not dithering: the error
is unbiased for each element and independent between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOWER_BITS = 16


def stochastic_bfloat16(x: Tensor, *, generator: torch.Generator | None) -> Tensor:
    """Round a float32 tensor to bfloat16 at random, without bias; infinities and NaN stay.

    `generator` lives on the tensor's device; None uses the device's default one.
    """
    assert x.dtype == torch.float32
    bits = torch.empty_like(x, dtype=torch.int32).random_(0, 1 << _LOWER_BITS, generator=generator)
    # The carry out of the mantissa goes into the exponent, which is right: 1.99.. may become 2.
    bits.add_(x.view(torch.int32)).bitwise_and_(-1 << _LOWER_BITS)
    # A NaN with all bits set would carry into the sign and become -0: such values bypass the sum.
    return torch.where(torch.isfinite(x), bits.view(torch.float32), x).to(torch.bfloat16)
