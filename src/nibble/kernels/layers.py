"""Who computes what lies between a block's matrix products: eager functions or their Triton twins.

The eager functions (`numerics/layer_functions.py`) are the truth and run anywhere; on CUDA Triton's
take their place where Triton is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from nibble.numerics import layer_functions as eager


@dataclass(frozen=True, kw_only=True)
class LayerKernels:
    """One provider's functions, with the signatures of `numerics.layer_functions`."""

    rms_norm: Callable[..., Tensor]
    rms_norm_backward: Callable[..., tuple[Tensor, Tensor | None]]
    rotate: Callable[..., tuple[Tensor, Tensor]]
    gate: Callable[..., Tensor]
    gate_backward: Callable[..., tuple[Tensor, Tensor | None]]


EAGER = LayerKernels(
    rms_norm=eager.rms_norm,
    rms_norm_backward=eager.rms_norm_backward,
    rotate=eager.rotate,
    gate=eager.gate,
    gate_backward=eager.gate_backward,
)


@cache
def layer_kernels(device_type: str) -> LayerKernels:
    """The fastest provider on this kind of device."""
    if device_type == "cuda" and find_spec("triton") is not None:
        return triton_kernels()
    return EAGER


@cache
def triton_kernels() -> LayerKernels:
    """Triton's functions; importing them needs triton."""
    from nibble.kernels import gate, rms_norm, rotary

    return LayerKernels(
        rms_norm=rms_norm.rms_norm,
        rms_norm_backward=rms_norm.rms_norm_backward,
        rotate=rotary.rotate,
        gate=gate.gate,
        gate_backward=gate.gate_backward,
    )
