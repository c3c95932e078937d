"""Who takes the steps of large tensors: the eager lists of optim/update.py, or Triton's kernels.

The eager functions are the truth and run anywhere. On CUDA with Triton a large tensor costs one
launch and one pass over its memory; small ones share the eager lists' launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from nibble.numerics.balancing import Balancing


@dataclass(frozen=True, kw_only=True)
class StepKernels:
    """Triton's functions, as kernels/adamw.py, move.py and balancing.py describe them."""

    adamw_: Callable[..., None]
    move_: Callable[..., None]
    move_int8_: Callable[..., None]
    balancing: Balancing


@cache
def step_kernels(device_type: str) -> StepKernels | None:
    """What is faster than the eager functions on this kind of device, if anything is."""
    if device_type == "cuda" and find_spec("triton") is not None:
        return triton_kernels()
    return None


@cache
def int8_decoder(device_type: str) -> Callable[..., Tensor] | None:
    """What makes trained INT8 weights dense faster than numerics/int8_weights.py, if anything."""
    if device_type == "cuda" and find_spec("triton") is not None:
        from nibble.kernels import int8_weights

        return int8_weights.decode
    return None


@cache
def triton_kernels() -> StepKernels:
    """Triton's functions; importing them needs triton."""
    from nibble.kernels import adamw, balancing, move

    return StepKernels(
        adamw_=adamw.adamw_,
        move_=move.move_,
        move_int8_=move.move_int8_,
        balancing=balancing.TRITON,
    )
