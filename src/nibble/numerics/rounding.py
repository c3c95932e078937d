"""Stochastic rounding: small updates that rounding to nearest loses survive on average.

bfloat16 is the upper half of a float32. Add a uniform 16-bit integer to the float32's bits and cut
the lower half: the value goes to the neighbour above with the probability of its distance from the
one below, so E[round(x)] = x (used for weights in arXiv 2010.06192). A weight of 1 keeps
8 significant bits, so an update below 1/512 of it vanishes under nearest rounding, for ever.

The noise is a function of an element's number and two words of key, with no state:

    h = n c1 + k0;   h ^= h >> 16;   h = h c2;   h ^= h >> 15;   h = (h ^ k1) c3;   h ^= h >> 16;
    h = h c1;   h ^= h >> 15

32-bit words that wrap around; c2 and c3 are those of a finaliser whose output bits depend almost
evenly on all input bits (Wellons 2018, "lowbias32"). The last product keeps streams apart whose
second words differ in one bit. So a part of a tensor draws what the whole would there, on any
device, in any order; the Triton kernels compute the same bits.

Costs one int32 tensor of noise, and eager a dozen passes. It is not dithering: the error is
unbiased for each element and independent between them; it is no source of randomness for secrets.
"""

from __future__ import annotations

import torch
from torch import Tensor

Key = tuple[int, int]
"""Two signed 32-bit words."""
# As signed words: 0x9E3779B1, 0x7FEB352D, 0x846CA68B.
FACTORS = (-1640531535, 2146121005, -2073254261)
_LOWER_BITS = 16


def random_bits(numbers: Tensor, *, key: Key) -> Tensor:
    """32 random bits, as int32, for each of the int32 `numbers` of elements."""
    first, second, third = FACTORS
    word = numbers * first + key[0]
    word ^= (word >> 16) & 0xFFFF
    word *= second
    word ^= (word >> 15) & 0x1FFFF
    word ^= key[1]
    word *= third
    word ^= (word >> 16) & 0xFFFF
    word *= first
    word ^= (word >> 15) & 0x1FFFF
    return word


def uniform(bits: Tensor) -> Tensor:
    """Float32 in [0, 1) of 32 random bits: the upper 24 of them."""
    return ((bits >> 8) & 0xFFFFFF).float().mul_(2.0**-24)


def stochastic_bfloat16(x: Tensor, *, bits: Tensor) -> Tensor:
    """Round a float32 tensor to bfloat16 by 32 random `bits` an element, without bias.

    The upper 16 bits are used. Infinities and NaN stay.
    """
    assert x.dtype == torch.float32
    # The carry out of the mantissa goes into the exponent, which is right: 1.99.. may become 2.
    noise = ((bits >> _LOWER_BITS) & 0xFFFF).add_(x.view(torch.int32))
    noise.bitwise_and_(-1 << _LOWER_BITS)
    # A NaN with all bits set would carry into the sign and become -0: such values bypass the sum.
    return torch.where(torch.isfinite(x), noise.view(torch.float32), x).to(torch.bfloat16)
