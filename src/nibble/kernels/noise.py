"""Noise of numbered elements and rounding by it, as parts of Triton kernels.

The same hash and the same bits as numerics/rounding.py, computed where a value is rounded: no noise
is ever in memory.
"""

# Triton's kernels are programs of their own language, and its decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

Place = tuple[int, int, int, int]
"""base, start, width, stride: element i is number base + (i + start) // width * stride +
(i + start) % width; width 0: base + start + i."""
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
CHANGING = ["rate", "decay", "key0", "key1", "base", "start", "width", "stride"]
"""Arguments that change from step to step: no variant of a kernel is compiled for their values.

Not the number of elements: a mask by one that is known to be a multiple of 16 lets every thread
load 16 bytes at once, and without that all loads and stores are of single elements.
"""


@triton.jit
def random_bits(element, key0, key1, base, start, width, stride, CUT: tl.constexpr):
    at = element.to(tl.int64) + start
    if CUT:
        # Division of 64 bits takes four times as long; a part has fewer than 2^31 elements.
        small = at.to(tl.int32)
        at = (small // width).to(tl.int64) * stride + small % width
    word = (at + base).to(tl.uint32) * 0x9E3779B1 + key0.to(tl.uint32)
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D
    word = word ^ (word >> 15)
    word = word ^ key1.to(tl.uint32)
    word = word * 0x846CA68B
    word = word ^ (word >> 16)
    word = word * 0x9E3779B1
    return word ^ (word >> 15)


@triton.jit
def rounded_bfloat16(x, bits):
    noisy = (x.to(tl.uint32, bitcast=True) + (bits >> 16)) & 0xFFFF0000
    # Infinities and NaN have all exponent bits set, and stay.
    is_finite = (x.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000
    return tl.where(is_finite, noisy.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
