"""The weight formats as a table: how each packs a matrix, unpacks it, and (int8) multiplies by it.

A format is one file here and one row in `CODECS`; nothing above this floor asks which format it
holds. These eager functions are the truth: every faster twin in `kernels/` is tested against them.
Equations and sources are in the formats' own modules.

Rows are independent in every format: pack(w)[rows] equals pack(w[rows]) bit for bit, on CPU and on
CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nibble.numerics import hqq, int8, nf4, ternary
from nibble.spec.formats import FormatSpec


class Pack(Protocol):
    """Quantise a dense weight [out, in] to the tensors that `spec` names."""

    def __call__(self, spec: FormatSpec, weight: Tensor) -> dict[str, Tensor]: ...


class Unpack(Protocol):
    """Make packed tensors dense: `shape` is (rows, in), the result has `dtype` and their device."""

    def __call__(
        self,
        spec: FormatSpec,
        tensors: Mapping[str, Tensor],
        *,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> Tensor: ...


class Matmul(Protocol):
    """x [..., in] times the packed weight's transpose, plus a bias [out]: [..., out] in x's type,
    no dense weight."""

    def __call__(
        self,
        spec: FormatSpec,
        tensors: Mapping[str, Tensor],
        x: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Codec:
    """One format. `matmul` is None where the product is by the dense weight."""

    pack: Pack
    unpack: Unpack
    matmul: Matmul | None = None


CODECS: dict[str, Codec] = {
    "nf4": Codec(pack=nf4.pack, unpack=nf4.unpack),
    "fp4": Codec(pack=nf4.pack, unpack=nf4.unpack),
    "int8": Codec(pack=int8.pack, unpack=int8.unpack, matmul=int8.matmul),
    "hqq": Codec(pack=hqq.pack, unpack=hqq.unpack),
    "ternary": Codec(pack=ternary.pack, unpack=ternary.unpack),
}


@torch.no_grad()
def pack(spec: FormatSpec, weight: Tensor) -> dict[str, Tensor]:
    """Quantise `weight` [out, in], of any float type, to the tensors of
    `spec.tensors(weight.shape)`.

    Dim 0 of every tensor is out-features. The result is on the weight's device and has no gradient.
    """
    return CODECS[spec.name].pack(spec, weight)


@torch.no_grad()
def unpack(
    spec: FormatSpec, tensors: Mapping[str, Tensor], *, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The dense weight of packed `tensors`: `shape` is (rows, in), where the rows may be any slice
    of the weight's.

    Computed in float32 and rounded once to `dtype`. No gradient flows to packed tensors.
    """
    return CODECS[spec.name].unpack(spec, tensors, shape=shape, dtype=dtype)
