"""Low-rank gradients: bases, projection and what is added back.

For a gradient G [m, n] and orthonormal bases P [m, r] (left) and Q [n, r] (right):

    left   R = P^T G  [r, n]    back(X) = P X         std: the smaller side of G is projected
    right  R = G Q    [m, r]    back(X) = X Q^T       reverse_std: the larger one
    full   R = P^T G Q [r, r]   back(X) = P X Q^T     (GaLore, arXiv 2403.03507)

A basis is the r leading singular vectors, or the range of a sketch Y = G S, S Gaussian [n, r]
(Halko, Martinsson, Tropp, arXiv 0909.4061), made orthonormal by shifted CholeskyQR2
(arXiv 1412.3337, 1809.11085), or by Householder's QR where Cholesky gives up. R and Y are linear in
G, so sums over micro-batches and ranks may be taken of them instead of gradients.

Of a 16-bit gradient a basis is made `coarse`: Gram matrices are of columns rounded to bfloat16, the
products of such numbers are exact in float32, so tensor cores compute them at their full speed and
Cholesky sees what it would see of float32 products. The rounding is noise of 0.2 % in the
directions, which the products of the sketch have already; it comes before the last triangular
factor, which is applied as a sum of bfloat16 numbers, so it costs no orthogonality.

What a rule answers to R is U. The whole step is written with a small matrix and a factor a channel:

    update = scale * (back(X) + f o G)
    none     X = U               f = 0
    fira     X = U - c phi o R   f = c phi / scale   phi_j = |U_j| / |R_j|     (arXiv 2410.01623)
    channel  X = 0               f = c phi           phi as in fira            (arXiv 2412.05270)
    tensor   X = 0               f = c phi           phi = |U| / |R|           (the same)

Fira's scale is of the projected part alone, scale back(U) + c phi o (G - scale back(R)), as in its
authors' code; their paper does not say.
Channels run along the side that is not projected; c <= 1 holds the norm of the part that was not
projected to `norm_growth` times that of the step before. Stored bases may be int8 or int4, two
codes a byte.

Costs: svd min(m, n) m n fp32 flops many times over; a sketch 2 m n r and its QR 8 m r^2, coarse
14 m r^2 in bf16, and 4 r^3 in fp32; half of that once more for a power iteration. Nothing waits
for the device but an SVD and a basis of nearly all directions. It keeps nothing and knows no
parameters, steps or seeds: generators are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from torch import Tensor

from nibble.numerics.cholesky import inverse_factors_
from nibble.spec.lowrank import STORAGE_BLOCK

JITTER = 1e-3
"""Noise added to a sketch, as a share of a column's norm: it stands in for missing rank."""
EXPLORATION = 0.5
"""Noise beside a guide of a sketch, as a share of a column's norm."""
SHIFT = 1e-6
"""Of a Gram matrix' diagonal, as a share of its norm: above the rounding of float32."""
CERTAIN_SHARE = 0.75
"""Columns for each row up to which noise alone conditions a sketch well enough."""
FEW = 128
"""Columns up to which a product in float32 is as fast as several in bfloat16."""
ORTHONORMAL_TOLERANCE = 1e-3
_TINY = torch.finfo(torch.float32).tiny

Making = Generator[tuple[Tensor, float], Tensor, Tensor]
"""A basis in the making: gives a Gram matrix and a shift, is sent the inverse factor; twice or more
in all. So many share the factoring, which a GPU does for a dozen as fast as for one.
"""


def orthonormalise(sketch: Tensor, *, generator: torch.Generator, coarse: bool = False) -> Tensor:
    """Orthonormal basis, float32 [m, r], of the range of `sketch` [m, r], r <= m.

    Seeded noise of JITTER of a column's norm is added first: a gradient of fewer tokens than r has
    no r directions, and those that rounding would choose are not the same on every run. It also
    bounds the condition of the columns if r is not close to m, so that nothing can fail and nothing
    waits for the device; a sketch that is nearly square is checked. The diagonal of the triangular
    factor is positive, so equal sketches give equal bases.
    """
    (basis,) = together([_orthonormal(_jittered(sketch, generator, coarse=coarse))])
    return basis


def together(makings: Sequence[Making]) -> Iterator[Tensor]:
    """Finish bases that are made by one recipe at one rank; yields them in order.

    Only the inverse factors of their Gram matrices are found together: products have a launch for
    each matrix, so a basis hangs on those beside it by the rounding of batched products on a GPU
    at most, and on a CPU not at all.
    """
    asked = [next(making) for making in makings]
    while asked:
        assert len(asked) == len(makings) and len({shift for _, shift in asked}) == 1
        shift = asked[0][1]
        grams = [gram for gram, _ in asked]
        stacked = torch.stack(grams) if len(grams) > 1 else grams[0].unsqueeze(0)
        asked.clear()
        del grams
        inverses = inverse_factors_(stacked, shift=shift)
        del stacked
        for making, inverse in zip(makings, inverses, strict=True):
            try:
                asked.append(making.send(inverse))
                continue
            except StopIteration as end:
                basis = end.value
            yield basis
            del basis
        del inverses, inverse


def _orthonormal(columns: Tensor) -> Making:
    """Two passes of CholeskyQR over jittered columns, the first shifted."""
    once = _solved(columns, (yield _gram(columns), SHIFT))
    once = once.to(columns.dtype)
    basis = _solved(once, (yield _gram(once), 0.0), num_terms=3)
    if columns.shape[1] <= CERTAIN_SHARE * columns.shape[0]:
        return basis
    gram = basis.mT @ basis
    gram.diagonal().sub_(1)
    # A comparison with NaN is false: `not <=` sends what is not finite to Householder as well.
    return basis if bool(gram.abs().amax() <= ORTHONORMAL_TOLERANCE) else householder(columns)


def _jittered(sketch: Tensor, generator: torch.Generator, *, coarse: bool = False) -> Tensor:
    """Columns of norm 1 with noise of JITTER of it, of noise alone where there is nothing else;
    bfloat16 if coarse. Equal lengths condition as well as a diagonal can.
    """
    noise = torch.randn(sketch.shape, generator=generator, device=sketch.device)
    norms: Tensor = torch.linalg.vector_norm(sketch, dim=0, dtype=torch.float32)
    columns = sketch / norms.clamp(min=_TINY)
    size = 1 / math.sqrt(sketch.shape[0])
    # Not `where` with numbers: it copies them to the device and waits.
    shares = torch.full_like(norms, JITTER * size).masked_fill_(norms <= _TINY, size)
    columns.addcmul_(noise, shares)
    return columns.to(torch.bfloat16) if coarse else columns


def _unit_columns(columns: Tensor) -> Tensor:
    """Columns of norm 1; columns of zeros stay."""
    norms: Tensor = torch.linalg.vector_norm(columns, dim=0)
    return columns / norms.clamp_(min=_TINY)


def _gram(columns: Tensor) -> Tensor:
    """Float32 columns^T columns of float32 or bfloat16 columns."""
    return _product(columns.mT, columns)


def _solved(columns: Tensor, inverse: Tensor, *, num_terms: int = 2) -> Tensor:
    """Q = columns X^T, float32, for the inverse factor X of their Gram matrix.

    With a shift the range of Q is still that of the columns (Fukaya et al., arXiv 1809.11085).
    Beside bfloat16 columns X is a sum of `num_terms` bfloat16 numbers: two leave off 2^-17 of it,
    which a further pass repairs, and three no more than float32 does. Few columns are bound by
    launches and not by arithmetic.
    """
    if columns.dtype == torch.float32 or columns.shape[1] <= FEW:
        return columns.float() @ inverse.mT
    total, rest = None, inverse
    for _ in range(num_terms):
        term = rest.to(columns.dtype)
        rest = rest - term
        made = _product(columns, term.mT)
        total = made if total is None else total.add_(made)
    assert total is not None
    return total


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Float32 product of float32 or bfloat16 matrices; of the latter by tensor cores, exactly but
    for the sums.
    """
    if one.dtype == torch.float32 or one.device.type != "cuda":
        return one.float() @ other.float()
    product: Tensor = torch.mm(one, other, out_dtype=torch.float32)
    return product


def householder(columns: Tensor) -> Tensor:
    """Q of a QR decomposition by reflections, float32, with a positive diagonal of R."""
    basis: Tensor
    basis, upper = torch.linalg.qr(columns.float())
    return basis * torch.where(upper.diagonal() < 0, -1.0, 1.0)


def svd_basis(matrix: Tensor, *, rank: int, side: str) -> Tensor:
    """The `rank` leading singular vectors of `matrix` [m, n] on one side, float32.

    Raises torch.linalg.LinAlgError where the decomposition does not converge.
    """
    left: Tensor
    right: Tensor
    left, _, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    return left[:, :rank].contiguous() if side == "left" else right[:rank].mT.contiguous()


def sketch_columns(
    length: int, *, rank: int, generator: torch.Generator, guide: Tensor | None = None
) -> Tensor:
    """Columns to sketch with, float32 [length, rank]: Gaussian, or those of a `guide` beside noise.

    A guide of this shape that lies near the dominant directions, such as the momentum of projected
    gradients, makes the sketch a step of power iteration for nothing. The noise, EXPLORATION of a
    column's norm, lets in directions that the guide does not know; columns of zeros are all noise.
    """
    columns = torch.randn(length, rank, generator=generator, device=generator.device)
    if guide is None:
        return columns
    return _unit_columns(guide.float()).add_(columns, alpha=EXPLORATION / math.sqrt(length))


def sketch(matrix: Tensor, *, columns: Tensor, side: str) -> Tensor:
    """Product of `matrix` [m, n] or its transpose with `columns`: float32, [side, rank].

    Linear in the matrix: sketches of micro-batches with the same columns add up.
    """
    oriented = matrix if side == "left" else matrix.mT
    return (oriented @ columns.to(matrix.dtype)).float()


def randomised_basis(
    product: Callable[[Tensor, str], Tensor],
    *,
    length: int,
    rank: int,
    side: str,
    generator: torch.Generator,
    num_power_iterations: int = 1,
    coarse: bool = False,
) -> Making:
    """Basis of the dominant range of a matrix [m, n] on one side, float32 [side, rank], in the
    making: `together` finishes it.

    `product(columns, side)` is the matrix (left) or its transpose (right) times columns, float32,
    as `sketch` makes it; `length` is the other side's. A power iteration takes the singular values
    to the third power, for two more products.
    """
    found = product(sketch_columns(length, rank=rank, generator=generator), side)
    other = "right" if side == "left" else "left"
    for _ in range(num_power_iterations):
        # 16-bit products tell directions apart down to a few thousandths of the largest, before
        # and after squaring: their columns are conditioned once, where they are squared. One pass
        # makes them far enough from dependent to multiply with once more.
        if coarse:
            found = _unit_columns(found)
        else:
            found = _jittered(found, generator)
            found = _solved(found, (yield _gram(found), SHIFT))
        found = _jittered(product(found, other), generator, coarse=coarse)
        found = product(_solved(found, (yield _gram(found), SHIFT)), side)
    found = _jittered(found, generator, coarse=coarse)
    return (yield from _orthonormal(found))


def random_basis(dim: int, *, rank: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns in directions of no preference, float32 [dim, rank]."""
    columns = torch.randn(dim, rank, generator=generator, device=generator.device)
    return orthonormalise(columns, generator=generator)


def gaussian_projection(dim: int, *, rank: int, generator: torch.Generator) -> Tensor:
    """Entries N(0, 1/rank), float32 [dim, rank]: keeps norms in the mean, cheap to make again.

    The projection of APOLLO, arXiv 2412.05270. Its columns are not orthonormal.
    """
    columns = torch.randn(dim, rank, generator=generator, device=generator.device)
    return columns.div_(math.sqrt(rank))


def project(matrix: Tensor, *, left: Tensor | None, right: Tensor | None) -> Tensor:
    """R of `matrix` [m, n], in its type."""
    small = matrix
    if left is not None:
        small = left.to(matrix.dtype).mT @ small
    if right is not None:
        small = small @ right.to(matrix.dtype)
    return small


def project_back(small: Tensor, *, left: Tensor | None, right: Tensor | None) -> Tensor:
    """back(small), in the type of `small` [r, n], [m, r] or [r, r]."""
    whole = small
    if right is not None:
        whole = whole @ right.to(small.dtype).mT
    if left is not None:
        whole = left.to(small.dtype) @ whole
    return whole


def add_back(
    matrix: Tensor,
    small: Tensor,
    *,
    left: Tensor | None,
    right: Tensor | None,
    share: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """matrix + share back(small) in one product, in the type of both, into `out` (which may be the
    matrix) if given.
    """
    if left is not None and right is not None:
        small, right = project_back(small, left=None, right=right), None
    one, other = (small, right.mT) if right is not None else (left, small)
    assert one is not None
    return torch.addmm(matrix, one.to(matrix.dtype), other.to(matrix.dtype), alpha=share, out=out)


def subspace_similarity(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared cosine of the angles between two subspaces, given by bases [m, r]; a scalar.

    1 for equal spans whatever the bases, r/m for random ones: the measure of how steady a basis is
    (Q-GaLore, arXiv 2407.08296, which compares the bases' columns and so their signs too).
    """
    return (one.float().mT @ other.float()).square().sum() / one.shape[1]


def channel_ratios(updates: Tensor, grads: Tensor, *, dim: int) -> Tensor:
    """|U_j| / |R_j| along `dim`, kept as a dim of 1; 0 where R_j is 0."""
    sizes = torch.linalg.vector_norm(grads, dim=dim, keepdim=True)
    ratios = torch.linalg.vector_norm(updates, dim=dim, keepdim=True) / sizes.clamp(min=_TINY)
    return torch.where(sizes > 0, ratios, 0.0)


def tensor_ratio(
    updates: Tensor, grads: Tensor, *, sum_: Callable[[Sequence[Tensor]], None] | None = None
) -> Tensor:
    """|U| / |R| of whole matrices [..., r, n], [...]; 0 where R is 0. `sum_` adds over parts."""
    norms = torch.stack([torch.linalg.vector_norm(x, dim=(-2, -1)) for x in (updates, grads)])
    if sum_ is not None:
        norms.square_()
        sum_([norms])
        norms.sqrt_()
    ratio = norms[0] / norms[1].clamp(min=_TINY)
    return torch.where(norms[1] > 0, ratio, 0.0)


def growth_factor(norm: Tensor, previous: Tensor, *, norm_growth: float) -> Tensor:
    """c that holds c * norm to at most norm_growth * previous; 1 where there was none (0).

    Fira's limiter, arXiv 2410.01623, section 4.3: it turns spikes into a slow rise.
    """
    limit = norm_growth * previous / norm.clamp(min=_TINY)
    return torch.where(previous > 0, limit.clamp(max=1.0), 1.0)


def pack_basis(basis: Tensor, *, storage: str) -> tuple[Tensor, ...]:
    """A basis [m, r] as `storage` keeps it: (values,) or (codes, scales).

    int8 and int4 are symmetric around 0, rounded to nearest, with one scale for each 256 elements
    of the flattened basis; int4 has two codes a byte, the first in the low half.
    """
    if storage == "fp32":
        return (basis.float(),)
    if storage == "bf16":
        return (basis.to(torch.bfloat16),)
    levels = 127 if storage == "int8" else 7
    flat = basis.float().reshape(-1)
    blocks = torch.constant_pad_nd(flat, (0, -flat.numel() % STORAGE_BLOCK)).view(-1, STORAGE_BLOCK)
    scales = blocks.abs().amax(dim=1) / levels
    codes = (blocks / scales.clamp(min=_TINY).unsqueeze(1)).round_().clamp_(-levels, levels)
    if storage == "int8":
        return codes.to(torch.int8).view(-1)[: flat.numel()].view(basis.shape), scales
    pairs = (codes + 8).to(torch.uint8).view(-1, 2)
    packed = pairs[:, 0] | (pairs[:, 1] << 4)
    return packed[: -(-flat.numel() // 2)].clone(), scales


def unpack_basis(
    stored: tuple[Tensor, ...], *, storage: str, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The basis of `shape` in `dtype` that `pack_basis` has stored."""
    if storage in ("fp32", "bf16"):
        return stored[0].to(dtype)
    codes, scales = stored
    num_elements = shape[0] * shape[1]
    if storage == "int4":
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).view(-1)[:num_elements]
        values = codes.float().sub_(8)
    else:
        values = codes.reshape(-1).float()
    padded = torch.constant_pad_nd(values, (0, -num_elements % STORAGE_BLOCK))
    whole = padded.view(-1, STORAGE_BLOCK) * scales.unsqueeze(1)
    return whole.view(-1)[:num_elements].view(shape).to(dtype)
