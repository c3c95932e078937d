"""How state lies in memory, and how lists of it become float32 for a rule and go back.

Stored state (spec/state.py has the table) is one or two tensors a slot and parameter. A rule wants
lists of float32. `unpack` yields those: the very tensors where they are float32 already, else views
into one flat buffer, in which each tensor begins at a whole block of 256. So hundreds of small
tensors are decoded by a few launches and a block of the 8-bit codec never spans two of them.
`write_back_` does the reverse after the rule has run.

bf16 state is rounded stochastically: to nearest, a second moment with b2 = 0.999 would stop moving,
since its step of 1/1000 is below half a unit of bfloat16 (1/512). 8-bit state is rounded to
nearest, as bitsandbytes does.

Costs four bytes an element while unpacked; the caller bounds how many are. It knows no rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nibble.numerics import codec8
from nibble.numerics.rounding import stochastic_bfloat16
from nibble.optim.noise import Address, Noise, padded_numbers
from nibble.spec.state import BLOCK, Slot, slot_tensors

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
    "int8": torch.int8,
}

Stored = tuple[Tensor, ...]
"""The tensors of one slot: (values,) or (codes, absmax)."""


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """Float32 views of stored tensors; `flat` is the buffer they lie in, None if not copied."""

    views: list[Tensor]
    flat: Tensor | None


def new_slot(
    slot: Slot, *, codec: str, shape: tuple[int, ...], whole: tuple[int, ...], device: torch.device
) -> dict[str, Tensor]:
    """Zero state of one slot for a part of `shape` of a `whole` parameter, by name."""
    specs = slot_tensors(slot, codec=codec, shape=shape, whole=whole)
    tensors = {
        name: torch.zeros(spec.shape, dtype=DTYPES[spec.dtype], device=device)
        for name, spec in specs.items()
    }
    codes = tensors.get(f"{slot.name}_codes")
    if codes is not None:
        codes.fill_(codec8.zero_code(signed=slot.signed))
    return tensors


def num_padded(numel: int) -> int:
    """`numel` rounded up to whole blocks."""
    return -(-numel // BLOCK) * BLOCK


def gather(tensors: Sequence[Tensor], *, dtype: torch.dtype, fill: int | None = None) -> Unpacked:
    """Copies of `tensors` behind one another in one buffer of `dtype`, each on a block's start.

    The gaps hold `fill`, or whatever was there if nobody reads them.
    """
    total = sum(num_padded(tensor.numel()) for tensor in tensors)
    flat = torch.empty(total, dtype=dtype, device=tensors[0].device)
    if fill is not None:
        flat.fill_(fill)
    views = views_into(flat, tensors)
    torch._foreach_copy_(views, list(tensors))
    return Unpacked(views=views, flat=flat)


def views_into(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a `gather`ed buffer shaped as the tensors of `like`."""
    parts = torch.split(flat, [num_padded(tensor.numel()) for tensor in like])
    return [
        (part if part.numel() == tensor.numel() else part[: tensor.numel()]).view(tensor.shape)
        for part, tensor in zip(parts, like, strict=True)
    ]


def as_float32(tensors: Sequence[Tensor]) -> Unpacked:
    """Float32 values of tensors of one dtype: themselves, or copies in one buffer."""
    if tensors[0].dtype == torch.float32:
        return Unpacked(views=list(tensors), flat=None)
    return gather(tensors, dtype=torch.float32)


def unpack(stored: Sequence[Stored], *, slot: Slot) -> Unpacked:
    """Float32 values of one slot of many parameters, all stored alike."""
    if len(stored[0]) == 1:
        return as_float32([tensors[0] for tensors in stored])
    zero = codec8.zero_code(signed=slot.signed)
    codes = gather([tensors[0] for tensors in stored], dtype=torch.uint8, fill=zero).flat
    assert codes is not None
    absmax = torch.cat([tensors[1] for tensors in stored])
    flat = codec8.decode_blocks(codes.view(-1, BLOCK), absmax, signed=slot.signed).view(-1)
    return Unpacked(views=views_into(flat, [tensors[0] for tensors in stored]), flat=flat)


def write_back_(
    stored: Sequence[Stored],
    *,
    values: Unpacked,
    slot: Slot,
    noise: Noise | None,
    addresses: Sequence[Address] = (),
) -> None:
    """Store the values that a rule has advanced, unless they are the stored tensors already."""
    if values.flat is None:
        return
    targets = [tensors[0] for tensors in stored]
    if len(stored[0]) == 1:
        store_rounded_(targets, flat=values.flat, noise=noise, addresses=addresses)
        return
    codes, absmax = codec8.encode_blocks(values.flat.view(-1, BLOCK), signed=slot.signed)
    torch._foreach_copy_(targets, views_into(codes.view(-1), targets))
    scales = [tensors[1] for tensors in stored]
    torch._foreach_copy_(scales, list(torch.split(absmax, [scale.numel() for scale in scales])))


def store_rounded_(
    targets: Sequence[Tensor],
    *,
    flat: Tensor,
    noise: Noise | None,
    addresses: Sequence[Address] = (),
) -> None:
    """Copy a `gather`ed float32 buffer into 16-bit tensors, stochastically with `noise` at the
    `addresses` of their elements.
    """
    if noise is not None:
        counts = [target.numel() for target in targets]
        numbers = padded_numbers(addresses, counts, device=flat.device)
        flat = stochastic_bfloat16(flat, bits=noise.bits(numbers))
    torch._foreach_copy_(list(targets), views_into(flat, targets))
