"""Random numbers that are a function of what they are for, so that a resumed run draws the same.

    seed' = mix(mix(seed ^ a) ^ b) ...      for whole numbers a, b, ... that name the purpose

No generator's state is kept or saved: the noise of parameter group 2 in step 700 is the same
whenever that step is taken. `mix` is splitmix64 (Steele, Lea, Flood 2014), since generators give
related streams for related seeds.

What is rounded at random takes its bits from the number of the element (numerics/rounding.py). All
elements of a group's parameters are numbered one parameter after another, by their place in the
*whole* tensors: so processes that hold parts round as one that holds everything would, and it does
not matter which tensors share a batch. Numbers wrap, so elements that are 2 G apart may share bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from nibble.numerics.rounding import Key, random_bits
from nibble.spec.state import BLOCK

_MASK64 = (1 << 64) - 1


def generator_for(seed: int, *purpose: int, device: torch.device) -> torch.Generator:
    """A generator on `device` whose stream depends on `seed` and all numbers of `purpose`."""
    return torch.Generator(device=device).manual_seed(_word(seed, purpose) >> 1)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Random bits for numbered elements."""

    word: int

    @property
    def key(self) -> Key:
        """The two words that kernels want."""
        return (_signed(self.word & 0xFFFFFFFF), _signed(self.word >> 32))

    def of(self, purpose: int) -> Noise:
        """Noise that is unrelated, for another use of the same elements."""
        return Noise(word=_mix(self.word ^ purpose))

    def bits(self, numbers: Tensor) -> Tensor:
        """32 random bits, int32, for each number."""
        return random_bits(numbers, key=self.key)


def noise_for(seed: int, *purpose: int) -> Noise:
    """Noise that depends on `seed` and all numbers of `purpose`."""
    return Noise(word=_word(seed, purpose))


@dataclass(frozen=True, kw_only=True)
class Address:
    """Which numbers the elements of a tensor have: element i is number base + i' with
    i' = start + i, or for a part of every row, base + i' // width * stride + i' % width.
    """

    base: int
    start: int = 0
    width: int = 0
    stride: int = 0

    def at(self, start: int) -> Address:
        """Of a slice that begins at element `start`."""
        return replace(self, start=self.start + start)

    @property
    def place(self) -> tuple[int, int, int, int]:
        """The numbers that kernels want."""
        return (self.base & 0x7FFFFFFF, self.start, self.width, self.stride)

    def numbers(self, count: int, *, device: torch.device) -> Tensor:
        """Numbers of the first `count` elements, int32."""
        found = torch.arange(self.start, self.start + count, device=device)
        if self.width:
            found = found // self.width * self.stride + found % self.width
        return (found + (self.base & 0x7FFFFFFF)).to(torch.int32)


def address_of(
    own: Sequence[int], *, whole: Sequence[int], dim: int | None, start: int, base: int
) -> Address:
    """Of the part `own` of a tensor of shape `whole`, cut along `dim` from `start` on."""
    if dim is None:
        return Address(base=base)
    base += start * prod(whole[dim + 1 :])
    if dim == 0:
        return Address(base=base)
    return Address(base=base, width=prod(own[dim:]), stride=prod(whole[dim:]))


def padded_numbers(
    addresses: Sequence[Address], counts: Sequence[int], *, device: torch.device
) -> Tensor:
    """Numbers of tensors one behind another, each on the start of a block of 256, int32."""
    if len(counts) == 1 or any(address.width for address in addresses):
        parts = [
            address.numbers(-(-count // BLOCK) * BLOCK, device=device)
            for address, count in zip(addresses, counts, strict=True)
        ]
        return torch.cat(parts)
    firsts = tuple((a.base & 0x7FFFFFFF) + a.start for a in addresses)
    starts = _block_starts(firsts, tuple(-(-count // BLOCK) for count in counts), device)
    inside = torch.arange(BLOCK, dtype=torch.int32, device=device)
    return (starts.unsqueeze(1) + inside).view(-1)


@lru_cache(maxsize=64)
def _block_starts(
    firsts: tuple[int, ...], num_blocks: tuple[int, ...], device: torch.device
) -> Tensor:
    """The number that each block begins with; copied to the device once for a batch."""
    parts = [
        first + BLOCK * torch.arange(count) for first, count in zip(firsts, num_blocks, strict=True)
    ]
    return torch.cat(parts).to(torch.int32).to(device)


def _word(seed: int, purpose: Sequence[int]) -> int:
    mixed = int(seed) & _MASK64
    for number in purpose:
        mixed = _mix(mixed ^ number)
    return mixed


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _mix(number: int) -> int:
    """A well mixed 64-bit word (splitmix64): neighbouring steps must not give related seeds."""
    word = (number + 0x9E3779B97F4A7C15) & _MASK64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK64
    return word ^ (word >> 31)
