"""Ternary weights {-1, 0, 1} with a scale for each row, five to a byte.

    g = mean |w| of the row;   t = clip(round(w / g), -1, 1);   s = mean |w| where t != 0;   w ~ s t

Codes follow the absmean rule of BitNet b1.58 (Ma et al., arXiv 2402.17764), a row at a time instead
of a matrix, so that any split by rows is valid. The scale is the least-squares one for those codes
(Li & Liu, Ternary Weight Networks, arXiv 1605.04711) and not g itself: the error is lower, and a
weight that is ternary already, such as a BitNet checkpoint's, is kept exactly.

Storage: trit k of byte j is the weight of column k R + j, where R is the row's bytes, so each
trit's plane is contiguous. A byte holds ceil(256/243 v) for the base-3 number v of its five trits:
multiplying by 3 modulo 256 then moves the next trit to the top, and (3 b) >> 8 reads it. No
division, no table. 1.6 bits a weight, and rows of whole eights of bytes.

Not a training format: gradients through rounding (BitNet's own recipe) are not here; this stores a
frozen base.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nibble.numerics.rows import padded_fp32, row_chunks
from nibble.spec.formats import TRITS_PER_BYTE, FormatSpec

MIN_ABSMEAN = 1e-30


def pack(spec: FormatSpec, weight: Tensor) -> dict[str, Tensor]:
    """Quantise `weight` [out, in] to codes uint8 [out, R] and scales float32 [out, 1]."""
    out, in_features = weight.shape
    num_bytes = spec.tensors((out, in_features))["codes"].shape[1]
    codes = torch.empty(out, num_bytes, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(out, 1, dtype=torch.float32, device=weight.device)
    for rows in row_chunks((out, in_features), weight.device):
        values = weight[rows].to(torch.float32)
        absmean = values.abs().mean(dim=1, keepdim=True).clamp_(min=MIN_ABSMEAN)
        trits = (values / absmean).round_().clamp_(-1, 1)
        kept = trits.abs().sum(dim=1, keepdim=True)
        scales[rows] = (values * trits).sum(dim=1, keepdim=True) / kept.clamp_(min=1)
        codes[rows] = pack_trits(trits, num_bytes=num_bytes)
    return {"codes": codes, "scales": scales}


def unpack(
    spec: FormatSpec, tensors: Mapping[str, Tensor], *, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The dense weight of `shape` (rows, in), in `dtype`; `tensors` may be any slice of rows."""
    codes, scales = tensors["codes"], tensors["scales"]
    dense = torch.empty(shape, dtype=dtype, device=codes.device)
    for rows in row_chunks(shape, codes.device):
        dense[rows] = unpack_trits(codes[rows], in_features=shape[1]) * scales[rows]
    return dense


def pack_trits(trits: Tensor, *, num_bytes: int) -> Tensor:
    """Five of {-1, 0, 1} a byte: [rows, in] to uint8 [rows, num_bytes]; missing columns are 0."""
    digits = padded_fp32(trits, TRITS_PER_BYTE * num_bytes).to(torch.int32) + 1
    number = torch.zeros(trits.shape[0], num_bytes, dtype=torch.int32, device=trits.device)
    for start in range(0, digits.shape[1], num_bytes):
        number = number * 3 + digits[:, start : start + num_bytes]
    return ((number * 256 + 242) // 243).to(torch.uint8)


def unpack_trits(codes: Tensor, *, in_features: int) -> Tensor:
    """The inverse of `pack_trits`: int16 [rows, in_features] of {-1, 0, 1}."""
    planes = []
    rest = codes
    for _ in range(TRITS_PER_BYTE):
        planes.append((rest.to(torch.int16) * 3 >> 8) - 1)
        rest = rest * 3
    return torch.cat(planes, dim=1)[:, :in_features]
