"""Rotary embedding of queries and keys in one Triton launch, forward and backward.

A program turns all heads of one token, so cosines and sines are read once a token. Inputs may lie
anywhere (slices of one product, heads before tokens); outputs are contiguous, so that what follows
needs no copy. Backward is the same kernel with the transposed turn.
"""

# Triton's kernels are programs of their own language, and its decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.launch import launch

NUM_WARPS = 4


@triton.jit
def _turn(
    source,
    target,
    head_stride,
    c1,
    c2,
    s1,
    s2,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    REST_PADDED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    head = tl.arange(0, HEADS_PADDED)[:, None]
    pair = tl.arange(0, HALF_PADDED)[None, :]
    inside = (head < HEADS) & (pair < HALF)
    read = source + head * head_stride + pair
    written = target + head * DIM + pair
    x1 = tl.load(read, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(read + HALF, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        y1 = x1 * c1 + x2 * s2
        y2 = x2 * c2 - x1 * s1
    else:
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
    tl.store(written, y1.to(target.dtype.element_ty), mask=inside)
    tl.store(written + HALF, y2.to(target.dtype.element_ty), mask=inside)
    if 2 * HALF < DIM:
        passing = 2 * HALF + tl.arange(0, REST_PADDED)[None, :]
        kept = (head < HEADS) & (passing < DIM)
        value = tl.load(source + head * head_stride + passing, mask=kept, other=0.0)
        tl.store(target + head * DIM + passing, value.to(target.dtype.element_ty), mask=kept)


@triton.jit
def _rotate_kernel(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    num_tokens,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    cos_batch,
    cos_token,
    Q_HEADS: tl.constexpr,
    Q_PADDED: tl.constexpr,
    K_HEADS: tl.constexpr,
    K_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    REST_PADDED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    batch = index // num_tokens
    token = index % num_tokens
    pair = tl.arange(0, HALF_PADDED)[None, :]
    place = batch * cos_batch + token * cos_token + pair
    c1 = tl.load(cos + place, mask=pair < HALF, other=0.0).to(tl.float32)
    c2 = tl.load(cos + place + HALF, mask=pair < HALF, other=0.0).to(tl.float32)
    s1 = tl.load(sin + place, mask=pair < HALF, other=0.0).to(tl.float32)
    s2 = tl.load(sin + place + HALF, mask=pair < HALF, other=0.0).to(tl.float32)
    _turn(
        q + batch * q_batch + token * q_token, q_out + index * (Q_HEADS * DIM), q_head,
        c1, c2, s1, s2, Q_HEADS, Q_PADDED, HALF, HALF_PADDED, DIM, REST_PADDED, INVERSE,
    )  # fmt: skip
    _turn(
        k + batch * k_batch + token * k_token, k_out + index * (K_HEADS * DIM), k_head,
        c1, c2, s1, s2, K_HEADS, K_PADDED, HALF, HALF_PADDED, DIM, REST_PADDED, INVERSE,
    )  # fmt: skip


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Twin of `numerics.layer_functions.rotate`, on CUDA."""
    q, k, cos = _dense_last(q), _dense_last(k), _dense_last(cos)
    sin = sin if sin.stride() == cos.stride() else sin.contiguous()
    if sin.stride() != cos.stride():
        cos = cos.contiguous()
    batch, tokens, q_heads, dim = q.shape
    k_heads, half = k.shape[2], cos.shape[-1] // 2
    made = [
        torch.empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype), device=x.device)
        for x in (q, k)
    ]
    if q.numel() == 0:
        return made[0], made[1]
    launch(
        _rotate_kernel,
        (batch * tokens,),
        (q, k, cos, sin, *made),
        tokens,
        *q.stride()[:3],
        *k.stride()[:3],
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(1),
        q_heads,
        triton.next_power_of_2(q_heads),
        k_heads,
        triton.next_power_of_2(k_heads),
        half,
        triton.next_power_of_2(half),
        dim,
        triton.next_power_of_2(max(dim - 2 * half, 1)),
        inverse,
        num_warps=NUM_WARPS,
    )
    return made[0], made[1]


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
