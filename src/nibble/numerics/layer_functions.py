"""What a decoder block computes between its matrix products, forward and backward.

    RMS norm       n = x / sqrt(mean(x^2) + eps),   y = w n   or   (1 + w) n
    rotary         y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin     (halves of a head's first part)
    gate           y = act(g) u,   act(g) = g p(g),   p = sigmoid(g) (SiLU), normal cdf (GELU) or
                   sigmoid(2 sqrt(2/pi) (g + 0.044715 g^3)) (by tanh z = 2 sigmoid(2 z) - 1)

Zhang & Sennrich 2019 (arXiv 1910.07467), Su et al. 2021 (2104.09864), Shazeer 2020 (2002.05202),
Hendrycks & Gimpel 2016 (1606.08415). These are the truth that `kernels/` is compared with. All
arithmetic is fp32. Casts are where transformers' models have them: n is rounded to the type of x
before w (Llama's way) or only after 1 + w (Gemma's), act(g) is rounded before the product with u;
rotary rounds once, where transformers rounds each of the two products. Each pass reads its inputs
once and makes nothing that is not returned (as kernels; as eager code it makes some five tensors).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Activation = Literal["silu", "gelu_tanh", "gelu"]

GELU_SLOPE = 1.5957691216057308  # 2 sqrt(2 / pi)
GELU_CUBIC = 0.044715
INVERSE_ROOT_2 = 0.7071067811865476
INVERSE_ROOT_2_PI = 0.3989422804014327


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool) -> Tensor:
    """Normalise the last dim: x [..., D], weight [D] -> [..., D]; with `unit_offset` 1 + weight
    scales.

    In the type of x, or, without offset, in the wider one of x and weight.
    """
    normal = _normal(x, eps)[0]
    if unit_offset:
        return (normal * (1.0 + weight.float())).to(x.dtype)
    return weight * normal.to(x.dtype)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients by x (in its type) and, if `trained`, by weight (fp32, [D])."""
    normal, inverse = _normal(x, eps)
    wide = grad.float()
    by_normal = wide * (weight.float() + (1.0 if unit_offset else 0.0))
    along = (by_normal * normal).mean(-1, keepdim=True)
    grad_x = (inverse * (by_normal - normal * along)).to(x.dtype)
    if not trained:
        return grad_x, None
    return grad_x, (wide * normal).flatten(0, -2).sum(0)


def _normal(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide * inverse, inverse


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their positions; `inverse` is the transpose, which backward needs.

    q [batch, tokens, heads, dim], k the same with its own heads; cos, sin [batch or 1, tokens,
    turned], turned <= dim even: the first `turned` entries of a head turn, the rest passes. Returns
    contiguous tensors in the wider type of each and cos.
    """
    return _turned(q, cos, sin, inverse), _turned(k, cos, sin, inverse)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, cos.dtype)
    half = cos.shape[-1] // 2
    cos, sin = cos.unsqueeze(2).float(), sin.unsqueeze(2).float()
    x1, x2 = x[..., :half].float(), x[..., half : 2 * half].float()
    c1, c2, s1, s2 = cos[..., :half], cos[..., half:], sin[..., :half], sin[..., half:]
    if inverse:
        y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    return torch.cat([y1.to(dtype), y2.to(dtype), x[..., 2 * half :].to(dtype)], dim=-1)


def gate(gate: Tensor, up: Tensor | None, *, activation: Activation) -> Tensor:
    """act(gate) * up, all [..., F]; without `up` act(gate) alone."""
    wide = gate.float()
    active = (wide * _share(wide, activation)[0]).to(gate.dtype)
    return active if up is None else active * up


def gate_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, *, activation: Activation
) -> tuple[Tensor, Tensor | None]:
    """Gradients by gate and up. A twin may write them where gate and up were: use those no more."""
    wide, by_output = gate.float(), grad.float()
    share, bend = _share(wide, activation)
    by_active = by_output if up is None else by_output * up.float()
    grad_gate = by_active * (share + bend)
    if up is None:
        return grad_gate.to(gate.dtype), None
    active = (wide * share).to(gate.dtype)
    return grad_gate.to(gate.dtype), (by_output * active.float()).to(up.dtype)


def _share(x: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """p(x) of act(x) = x p(x), and x p'(x)."""
    if activation == "gelu":
        density = INVERSE_ROOT_2_PI * torch.exp(-0.5 * x * x)
        return 0.5 * (1.0 + torch.erf(x * INVERSE_ROOT_2)), x * density
    if activation == "silu":
        share = torch.sigmoid(x)
        return share, x * share * (1.0 - share)
    square = x * x
    share = torch.sigmoid(GELU_SLOPE * x * (1.0 + GELU_CUBIC * square))
    return share, x * share * (1.0 - share) * (GELU_SLOPE * (1.0 + 3.0 * GELU_CUBIC * square))
