"""Inverse Cholesky factors of many small Gram matrices at once.

    A = L L^T = [A11 A21^T; A21 A22]         X = L^-1, found by halves:
    X11 of A11      L21 = A21 X11^T      X22 of A22 - L21 L21^T      X21 = -X22 L21 X11

down to blocks of LEAF, which a library factors and inverts. A library's factor of one matrix of
1024 waits for itself most of the time; by halves a dozen matrices take as long as one, nearly all
of it in products, and the inverse makes the solve that follows a product too.

An inverse in place of a solve leaves A21 off by rounding times the condition of L11, where a solve
leaves it off by rounding alone; so L21 is corrected once by what it leaves of A21 (Higham, Accuracy
and Stability of Numerical Algorithms, 2nd ed., 13.3 and 14.3).

Costs: some 2 k^3 flops a matrix in float32 and 20 k^2 bytes, of which 4 k^2 are the result. Nothing
waits for the device. It is no way to solve one system: there a library's solve is right.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAF = 128
"""Rows up to which a library's factor of a batch is used as it is."""
_TINY = torch.finfo(torch.float32).tiny


def inverse_factors(grams: Tensor, *, shift: float = 0.0) -> Tensor:
    """X [b, k, k], lower triangular, with X A X^T = 1 for each A of `grams` [b, k, k], float32.

    A is scaled to a diagonal of ones first. A `shift` of its diagonal, as a share of its norm, lets
    it succeed above rounding: then X (A + shift |A| diag A) X^T = 1. Where it fails, X only scales.
    """
    scales = grams.diagonal(dim1=-2, dim2=-1).clamp(min=_TINY).rsqrt()
    scaled = grams * scales.unsqueeze(-1)
    scaled.mul_(scales.unsqueeze(-2))
    if shift > 0:
        norms = torch.linalg.vector_norm(scaled, dim=(-2, -1))
        scaled.diagonal(dim1=-2, dim2=-1).add_(norms.unsqueeze(-1), alpha=shift)
    inverse = torch.zeros_like(scaled)
    failed = _invert_(scaled, inverse)
    # A leaf's word alone does not tell of what is not finite elsewhere.
    failed = failed | ~inverse.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    one = torch.eye(scaled.shape[-1], device=scaled.device)
    return torch.where(failed.view(-1, 1, 1), one, inverse).mul_(scales.unsqueeze(-2))


def _invert_(gram: Tensor, inverse: Tensor) -> Tensor:
    """Write the factor of `gram` over it and its inverse to `inverse`, zeros above; whether that
    failed.
    """
    size = gram.shape[-1]
    if size <= LEAF:
        lower, info = torch.linalg.cholesky_ex(gram)
        gram.copy_(lower)
        one = torch.eye(size, device=gram.device).expand_as(lower)
        inverse.copy_(torch.linalg.solve_triangular(lower, one, upper=False))
        failed: Tensor = info != 0
        return failed
    half = LEAF * -(-size // (2 * LEAF))
    first, second = inverse[:, :half, :half], inverse[:, half:, half:]
    failed = _invert_(gram[:, :half, :half], first)
    below = gram[:, half:, :half]
    factor = torch.bmm(below, first.mT)
    left_over = torch.baddbmm(below, factor, gram[:, :half, :half].mT, alpha=-1)
    factor.baddbmm_(left_over, first.mT)
    below.copy_(factor)
    gram[:, :half, half:].zero_()
    gram[:, half:, half:].baddbmm_(factor, factor.mT, alpha=-1)
    failed = failed | _invert_(gram[:, half:, half:], second)
    torch.mul(second @ (factor @ first), -1, out=inverse[:, half:, :half])
    return failed
