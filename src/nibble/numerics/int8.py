"""LLM.int8: vector-wise 8-bit weights, and a product that keeps outlier columns in 16 bit.

    s_w = max |w| of a row,   c_w = round(127 w / s_w)
    y = sum over ordinary columns of (c_x c_w) s_x s_w / 127^2  +  sum over outlier columns of x w

A column of the input is an outlier where any |x| >= threshold; a token's scale s_x is the maximum
over its values below the threshold, and the integer product is exact in 32 bits. Source: Dettmers
et al., LLM.int8(), arXiv 2208.07339 (threshold 6.0); arithmetic and storage are bitsandbytes'
(scales are the absolute maxima).

Costs: finding the outlier columns waits for the device once a product (its twin does not). The
product has no gradient of its own: autograd functions multiply by the dense weight. It is not
weight-only storage: activations are rounded too, as the paper does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nibble.numerics.rows import row_chunks
from nibble.spec.formats import FormatSpec

LEVELS = 127.0
EXACT_FP32_COLUMNS = 1024
"""Products of this many int8 pairs sum exactly in float32: 1024 * 127^2 < 2^24."""


def pack(spec: FormatSpec, weight: Tensor) -> dict[str, Tensor]:
    """Quantise `weight` [out, in] to codes int8 [out, in] and scales float32 [out, 1]."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
    for rows in row_chunks((weight.shape[0], weight.shape[1]), weight.device):
        values = weight[rows].to(torch.float32)
        absmax = values.abs().amax(dim=1, keepdim=True)
        codes[rows] = _round(values, absmax)
        scales[rows] = absmax
    return {"codes": codes, "scales": scales}


def unpack(
    spec: FormatSpec, tensors: Mapping[str, Tensor], *, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The dense weight of `shape` (rows, in), in `dtype`; `tensors` may be any slice of rows."""
    dense = torch.empty(shape, dtype=dtype, device=tensors["codes"].device)
    for rows in row_chunks(shape, dense.device):
        dense[rows] = tensors["codes"][rows] * tensors["scales"][rows] * (1 / LEVELS)
    return dense


def matmul(
    spec: FormatSpec, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`x` [..., in] times the packed weight's transpose, plus `bias`: [..., out] in x's type."""
    threshold = spec.int8_threshold
    product = int8_matmul(x, tensors["codes"], tensors["scales"], threshold=threshold)
    return product if bias is None else product.add_(bias.to(x.dtype))


def int8_matmul(x: Tensor, codes: Tensor, scales: Tensor, *, threshold: float) -> Tensor:
    """LLM.int8's mixed product x w^T: [..., out] in x's type.

    `x` [..., in] of a float type, `codes` int8 [out, in], `scales` float32 [out, 1]. Threshold 0
    treats every column as ordinary.
    """
    flat = x.reshape(-1, x.shape[-1])
    x_codes, x_scales, outliers = quantize_tokens(flat, threshold=threshold)
    product = rescale(integer_matmul(x_codes, codes), x_scales, scales, dtype=x.dtype)
    product = add_outliers(product, flat, codes, scales, outliers)
    return product.view(*x.shape[:-1], codes.shape[0])


def quantize_tokens(x: Tensor, *, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Round each row of `x` [tokens, in] to 8 bits, outlier columns to zero.

    Returns codes int8 [tokens, in], scales float32 [tokens, 1] and the outlier columns' indices
    int64 [any number].
    """
    values = x.to(torch.float32)
    size = values.abs()
    if threshold > 0:
        is_outlier = size >= threshold
        columns = is_outlier.any(dim=0).nonzero().squeeze(1)
        size = size.masked_fill_(is_outlier, 0)
    else:
        columns = torch.empty(0, dtype=torch.int64, device=x.device)
    absmax = size.amax(dim=1, keepdim=True)
    codes = _round(values, absmax)
    if columns.numel():
        codes.index_fill_(1, columns, 0)
    return codes, absmax, columns


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact int32 product a b^T [m, n] of int8 matrices a [m, k] and b [n, k].

    CUDA's integer product wants more than 16 rows, and k and n in eights: smaller ones are padded
    with zeros and cut.
    """
    if a.device.type not in ("cpu", "cuda"):
        return _integer_matmul_in_float(a, b)
    m, n = a.shape[0], b.shape[0]
    if a.device.type == "cuda":
        a = _zero_padded(a, rows=max(m, 32), columns=-(-a.shape[1] // 8) * 8)
        b = _zero_padded(b, rows=-(-n // 8) * 8, columns=a.shape[1])
    return torch._int_mm(a, b.t())[:m, :n]


def rescale(product: Tensor, x_scales: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """An int32 product [tokens, out] times both scales, in `dtype`."""
    factors = scales.view(1, -1) * (1 / (LEVELS * LEVELS))
    return (product * (x_scales * factors)).to(dtype)


def add_outliers(
    product: Tensor, x: Tensor, codes: Tensor, scales: Tensor, columns: Tensor
) -> Tensor:
    """Add to `product` [tokens, out] the outlier `columns` of x times the weight's, in x's type."""
    if not columns.numel():
        return product
    weight = (codes[:, columns] * scales * (1 / LEVELS)).to(x.dtype)
    return product.addmm_(x[:, columns], weight.t())


def _round(values: Tensor, absmax: Tensor) -> Tensor:
    """round(127 values / absmax) as int8; rows of zeros give zeros."""
    inverse = torch.where(absmax > 0, LEVELS / absmax, 0)
    # Outliers exceed the maximum; their columns are zeroed later, the clamp defines the cast.
    return (values * inverse).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)


def _zero_padded(matrix: Tensor, *, rows: int, columns: int) -> Tensor:
    if matrix.shape == (rows, columns):
        return matrix
    padded = matrix.new_zeros(rows, columns)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


def _integer_matmul_in_float(a: Tensor, b: Tensor) -> Tensor:
    """The same product where the device has no integer one: float32 slices that cannot round."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], EXACT_FP32_COLUMNS):
        columns = slice(start, start + EXACT_FP32_COLUMNS)
        total += (a[:, columns].float() @ b[:, columns].float().t()).to(torch.int32)
    return total
