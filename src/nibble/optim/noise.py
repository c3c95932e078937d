"""Random numbers that are a function of what they are for, so that a resumed run draws the same.

    seed' = mix(mix(seed ^ a) ^ b) ...      for whole numbers a, b, ... that name the purpose

No generator's state is kept or saved: the noise of parameter group 2 in step 700 is the same
whenever that step is taken. `mix` is splitmix64 (Steele, Lea, Flood 2014), since generators give
related streams for related seeds.
"""

from __future__ import annotations

import torch

_MASK64 = (1 << 64) - 1


def generator_for(seed: int, *purpose: int, device: torch.device) -> torch.Generator:
    """A generator on `device` whose stream depends on `seed` and all numbers of `purpose`."""
    mixed = int(seed)
    for number in purpose:
        mixed = _mix(mixed ^ number)
    return torch.Generator(device=device).manual_seed(mixed >> 1)


def _mix(number: int) -> int:
    """A well mixed 64-bit word (splitmix64): neighbouring steps must not give related seeds."""
    word = (number + 0x9E3779B97F4A7C15) & _MASK64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK64
    return word ^ (word >> 31)
