"""Who computes what lies between matrix products: eager functions or their Triton twins.

The eager functions (`numerics/layer_functions.py`, `numerics/alibi_attention.py`,
`numerics/cross_entropy.py`) are the truth and run anywhere; on CUDA Triton's take their place where
Triton is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from nibble.numerics import alibi_attention as eager_attention
from nibble.numerics import layer_functions as eager
from nibble.numerics.cross_entropy import cross_entropy_


@dataclass(frozen=True, kw_only=True)
class LayerKernels:
    """One provider's functions, with the signatures of the eager ones."""

    rms_norm: Callable[..., Tensor]
    rms_norm_backward: Callable[..., tuple[Tensor, Tensor | None]]
    rotate: Callable[..., tuple[Tensor, Tensor]]
    gate: Callable[..., Tensor]
    gate_backward: Callable[..., tuple[Tensor, Tensor | None]]
    cross_entropy_: Callable[..., Tensor]
    alibi_attention: Callable[..., tuple[Tensor, Tensor]]
    alibi_attention_backward: Callable[..., Tensor]


EAGER = LayerKernels(
    rms_norm=eager.rms_norm,
    rms_norm_backward=eager.rms_norm_backward,
    rotate=eager.rotate,
    gate=eager.gate,
    gate_backward=eager.gate_backward,
    cross_entropy_=cross_entropy_,
    alibi_attention=eager_attention.alibi_attention,
    alibi_attention_backward=eager_attention.alibi_attention_backward,
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
    from nibble.kernels import alibi_attention, cross_entropy, gate, rms_norm, rotary

    return LayerKernels(
        rms_norm=rms_norm.rms_norm,
        rms_norm_backward=rms_norm.rms_norm_backward,
        rotate=rotary.rotate,
        gate=gate.gate,
        gate_backward=gate.gate_backward,
        cross_entropy_=cross_entropy.cross_entropy_,
        alibi_attention=alibi_attention.alibi_attention,
        alibi_attention_backward=alibi_attention.alibi_attention_backward,
    )
