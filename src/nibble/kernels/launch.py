"""Launching a Triton kernel that was launched before with the same numbers, at a third of the cost.

Triton's own launch inspects every argument to find which of its compiled variants fits; on a host
that is slow beside its GPU that takes longer than unpacking a matrix. What a variant depends on is
the kernel, the device, the types and 16-byte alignment of the tensors, and the numbers: here these
are a dictionary's key, and the variant that Triton returned for them is launched directly. Numbers
that a kernel does not specialise on (`do_not_specialize`, and all floats) may change from launch to
launch: of those only the width counts. Tensors that are not aligned (odd slices) and Triton's
interpreter take the ordinary way.
"""

# Triton has no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ALIGNMENT_BYTES = 16
_compiled: dict[tuple[object, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    *numbers: float,
    num_warps: int,
    num_stages: int = 3,
    changing: slice = slice(0),
) -> None:
    """Run `kernel` on the tensors' device: `tensors` are its first arguments, `numbers` the rest.

    `numbers` are all other arguments in the kernel's order, its compile-time constants among them.
    `num_stages`: how many loads a kernel's loops have in flight. `changing`: where among the
    numbers those are that no variant depends on.
    """
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            words: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
            launch(kernel, grid, tensors, *numbers, **words, changing=changing)
        return
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    types = [tensor.dtype for tensor in tensors]
    fixed: tuple[float, ...] = numbers
    if some := numbers[changing]:
        fixed = (*numbers[: changing.start], *numbers[changing.stop :], *map(_is_wide, some))
    key = (id(kernel), device.index, num_warps, num_stages, fixed, *types)
    variant = _compiled.get(key) if addresses % ALIGNMENT_BYTES == 0 else None
    if variant is not None:
        variant[(*grid, 1, 1)[:3]](*tensors, *numbers)
        return
    variant = kernel[grid](*tensors, *numbers, num_warps=num_warps, num_stages=num_stages)
    if variant is not None and addresses % ALIGNMENT_BYTES == 0:  # None: the interpreter's
        _compiled[key] = variant


def _is_wide(number: float) -> bool:
    """Whether Triton passes it as 64 bits."""
    return isinstance(number, int) and not -(1 << 31) <= number < 1 << 31
