"""Causal attention with a bias for each key (ALiBi), forward and backward.

    s_ij = scale q_i . k_j + b_j  for j <= i        p_i = softmax(s_i)        o_i = sum_j p_ij v_j
    dv_j = sum_i p_ij g_i       ds_ij = p_ij (g_i . v_j - g_i . o_i)
    dq_i = scale sum_j ds_ij k_j          dk_j = scale sum_i ds_ij q_i

ALiBi (Press et al. 2021, arXiv 2108.12409) adds slope * (j - i) to the scores of a head; the part
of i is the same for a whole row of scores and softmax does not see it, so a number for each head
and key says all. BLOOM computes these numbers once a pass, in the type of the model. Padding of the
keys is another number for each key, and all that backward wants beside its inputs is o and the
logarithm of each row's sum (Dao et al. 2022, 2205.14135).

These are the truth that `kernels/` is compared with, in fp32; they hold the scores of one row of
the batch. Not here: dropout of the probabilities, gradients by the bias, other keys than queries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LEAST_BIAS = -1e30
"""Stands for minus infinity: a query that sees padding only gets a finite mean of it."""


def alibi_attention(
    qkv: Tensor, bias: Tensor, padding: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """What each token gets from itself and those before it, and the scores' log-sum-exp.

    qkv: [rows, tokens, heads, 3, dim], query, key and value of a head side by side, or a view that
    looks so. bias: [rows, heads, tokens], added to the scores of a key. padding: [rows, tokens],
    added for all heads. Returns [rows, tokens, heads, dim] contiguous in the type of qkv, and fp32
    [rows, heads, tokens].
    """
    out = torch.empty(qkv.shape[:3] + qkv.shape[4:], dtype=qkv.dtype, device=qkv.device)
    sums = torch.empty(bias.shape, dtype=torch.float32, device=qkv.device)
    for row, (_, _, v, scores) in enumerate(_each_row(qkv, bias, padding, scale)):
        sums[row] = torch.logsumexp(scores, dim=-1)
        shares = torch.softmax(scores, dim=-1)
        out[row] = (shares @ v).transpose(0, 1).to(out.dtype)
    return out, sums


def alibi_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    sums: Tensor,
    bias: Tensor,
    padding: Tensor | None,
    *,
    scale: float,
) -> Tensor:
    """The gradient by qkv, with its strides; `out` and `sums` are what forward gave."""
    grad_qkv = torch.empty_like(qkv)
    for row, (q, k, v, scores) in enumerate(_each_row(qkv, bias, padding, scale)):
        by_out = grad[row].transpose(0, 1).float()
        shares = torch.exp(scores - sums[row][..., None])
        along = (by_out * out[row].transpose(0, 1).float()).sum(-1, keepdim=True)
        by_scores = shares * (by_out @ v.mT - along) * scale
        parts = (by_scores @ k, by_scores.mT @ q, shares.mT @ by_out)
        grad_qkv[row] = torch.stack(parts, dim=2).transpose(0, 1).to(qkv.dtype)
    return grad_qkv


def _each_row(
    qkv: Tensor, bias: Tensor, padding: Tensor | None, scale: float
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """q, k, v [heads, tokens, dim] and the scores of each row, in fp32."""
    tokens = qkv.shape[1]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=qkv.device).triu_(1)
    for row in range(qkv.shape[0]):
        q, k, v = qkv[row].permute(2, 1, 0, 3).float()
        keys = bias[row].float()
        if padding is not None:
            keys = keys + padding[row].float()
        scores = (q * scale) @ k.mT + keys.clamp_min(LEAST_BIAS)[:, None]
        yield q, k, v, scores.masked_fill_(later, float("-inf"))
