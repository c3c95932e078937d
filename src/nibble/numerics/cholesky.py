"""Inverse Cholesky factors of many small Gram matrices at once.

    A = L L^T = [A11 A21^T; A21 A22]         X = L^-1, found by halves:
    X11 of A11      L21 = A21 X11^T      X22 of A22 - L21 L21^T      X21 = -X22 L21 X11

down to blocks of LEAF, which a library factors and inverts. A library's factor of one matrix of
1024 waits for itself most of the time; by halves a dozen matrices take as long as one, nearly all
of it in products, and the inverse makes the solve that follows a product too.

An inverse in place of a solve leaves A21 off by rounding times the condition of L11, where a solve
leaves it off by rounding alone; so L21 is corrected once by what it leaves of A21 (Higham, Accuracy
and Stability of Numerical Algorithms, 2nd ed., 13.3 and 14.3).

Costs: some 2 k^3 flops a matrix in float32; 20 k^2 bytes, matrix and result included. Nothing waits
for the device. It is no way to solve one system: there a library's solve is right.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAF = 128
"""Rows up to which a library's factor of a batch is used as it is."""


def inverse_factors_(grams: Tensor, *, shift: float = 0.0) -> Tensor:
    """X [b, k, k], lower triangular, with X A X^T = 1 for each A of `grams` [b, k, k], float32,
    which are overwritten. Where it fails, X is 1.

    A `shift` of the diagonal, as a share of A's norm, lets it succeed above rounding: then
    X (A + shift |A|) X^T = 1.
    """
    if shift > 0:
        norms = torch.linalg.vector_norm(grams, dim=(-2, -1), keepdim=True)
        grams.diagonal(dim1=-2, dim2=-1).add_(norms.squeeze(-1), alpha=shift)
    one = torch.eye(grams.shape[-1], device=grams.device).expand_as(grams)
    inverse, failed = _inverse(grams, one)
    return torch.where(failed.view(-1, 1, 1), one, inverse)


def _inverse(gram: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse factor of `gram`, which is overwritten with the factor where it is large, and
    whether that failed.
    """
    size = gram.shape[-1]
    if size <= LEAF:
        lower, info = torch.linalg.cholesky_ex(gram)
        return torch.linalg.solve_triangular(lower, one, upper=False), info != 0
    inverse = torch.zeros_like(gram)
    return inverse, _invert_(gram, inverse, one)


def _invert_(gram: Tensor, inverse: Tensor, one: Tensor) -> Tensor:
    """Write the factor of `gram` over it and its inverse to `inverse`, zeros above; whether that
    failed.
    """
    size = gram.shape[-1]
    if size <= LEAF:
        lower, info = torch.linalg.cholesky_ex(gram)
        gram.copy_(lower)
        inverse.copy_(torch.linalg.solve_triangular(lower, one[:, :size, :size], upper=False))
        failed: Tensor = info != 0
        return failed
    half = LEAF * -(-size // (2 * LEAF))
    first, second = inverse[:, :half, :half], inverse[:, half:, half:]
    failed = _invert_(gram[:, :half, :half], first, one)
    below = gram[:, half:, :half]
    factor = torch.bmm(below, first.mT)
    left_over = torch.baddbmm(below, factor, gram[:, :half, :half].mT, alpha=-1)
    factor.baddbmm_(left_over, first.mT)
    below.copy_(factor)
    gram[:, :half, half:].zero_()
    gram[:, half:, half:].baddbmm_(factor, factor.mT, alpha=-1)
    failed = failed | _invert_(gram[:, half:, half:], second, one)
    torch.mul(second @ (factor @ first), -1, out=inverse[:, half:, :half])
    return failed
