"""Weight formats: the names, shapes, types and bytes of a packed weight.

A packed weight is a handful of plain tensors whose dim 0 is out-features and whose blocks lie
inside a row. So any slice of rows of all its tensors is itself a valid packed weight: sharding,
streaming and loading never cut a block, and scales travel with the codes they belong to. Rows are
padded with zeros to whole blocks; the padding is counted here.

    nf4, fp4   codes [out, P/2] uint8, scales [out, P/block] float32
      double   codes, scales [out, even(P/block)] uint8, scale_steps, scale_offsets [out, S] float32
    int8       codes [out, in] int8, scales [out, 1] float32
    hqq        codes [out, P bits/8] uint8, scales [out, P/block] bfloat16, zeros likewise float16
               (at 8 bits both float32)
    ternary    codes [out, in/5 up to a multiple of 8] uint8, scales [out, 1] float32

P is `in` rounded up to whole blocks and S = ceil(P/block/256). Rows of uint8 are kept even, so that
a tensor may be viewed as 16-bit floats where a library shards only floats (int8 codes are as wide
as the weight). Bits a weight for 4096 columns in blocks of 64: nf4 4.14, without double
quantisation 4.5; int8 8.01; hqq bits + 0.5 (8 bits: 9); ternary 1.62.

This is the one source of sizes: the planner reads `nbytes`, and `numerics/formats.py` makes exactly
these tensors. It costs nothing (integers only) and knows nothing of values: those are `numerics/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from nibble.errors import ConfigError
from nibble.spec.config import Quant

DTYPE_BYTES = {"uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
DEFAULT_BLOCK = 64
DEFAULT_INT8_THRESHOLD = 6.0
DEFAULT_HQQ_BITS = 4
MAX_BLOCK = 4096
SCALES_PER_STEP = 256
"""Second-level block of double quantisation: scales of one row that share a step and an offset."""
TRITS_PER_BYTE = 5


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Shape and type of one tensor of a packed weight."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class FormatSpec:
    """One weight format with its parameters; fields that a format does not have keep their neutral
    value.

    `bits` is the width of a code (ternary: 2, stored in 1.6), `block` the weights of a row that
    share a scale (0: the whole row), `int8_threshold` the size from which an input column is
    multiplied in 16 bit (0: never).
    """

    name: str
    bits: int
    block: int = 0
    double_quant: bool = False
    int8_threshold: float = 0.0

    def padded(self, in_features: int) -> int:
        """`in_features` rounded up to whole blocks: the length of a row as it is packed."""
        return in_features if self.block == 0 else -(-in_features // self.block) * self.block

    def tensors(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """The tensors that pack a weight of `shape` (out, in): name to shape and type."""
        out, in_features = shape
        padded = self.padded(in_features)
        if self.name == "int8":
            return {"codes": _spec(out, in_features, "int8"), "scales": _spec(out, 1, "float32")}
        if self.name == "ternary":
            num_bytes = -(-in_features // (8 * TRITS_PER_BYTE)) * 8
            return {"codes": _spec(out, num_bytes, "uint8"), "scales": _spec(out, 1, "float32")}
        codes = _spec(out, padded * self.bits // 8, "uint8")
        num_blocks = padded // self.block
        if self.name == "hqq":
            return {
                "codes": codes,
                "scales": _spec(out, num_blocks, "float32" if self.bits == 8 else "bfloat16"),
                "zeros": _spec(out, num_blocks, "float32" if self.bits == 8 else "float16"),
            }
        if not self.double_quant:
            return {"codes": codes, "scales": _spec(out, num_blocks, "float32")}
        num_steps = -(-num_blocks // SCALES_PER_STEP)
        return {
            "codes": codes,
            "scales": _spec(out, _even(num_blocks), "uint8"),
            "scale_steps": _spec(out, num_steps, "float32"),
            "scale_offsets": _spec(out, num_steps, "float32"),
        }

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of all tensors of a packed weight of `shape` (out, in), padding included."""
        return sum(spec.nbytes for spec in self.tensors(shape).values())


def format_spec(quant: Quant) -> FormatSpec | None:
    """The format that a recipe's `quant` section means, with defaults filled in; None for "none".

    Defaults: block 64, double_quant true, int8_threshold 6.0, bits 4 (hqq). Options that a format
    does not have are ignored here; `spec/rules.py` refuses them. Raises ConfigError for a block
    that is not a power of two from 16 to 4096.
    """
    name = quant.format
    block = DEFAULT_BLOCK if quant.block is None else quant.block
    if not 16 <= block <= MAX_BLOCK or block & (block - 1):
        raise ConfigError(
            f"quant.block={block} is not a power of two from 16 to {MAX_BLOCK}; 64 is usual"
        )
    if name in ("nf4", "fp4"):
        double_quant = quant.double_quant is not False
        return FormatSpec(name=name, bits=4, block=block, double_quant=double_quant)
    if name == "hqq":
        return FormatSpec(name=name, bits=quant.bits or DEFAULT_HQQ_BITS, block=block)
    if name == "int8":
        given = quant.int8_threshold
        threshold = DEFAULT_INT8_THRESHOLD if given is None else given
        return FormatSpec(name=name, bits=8, int8_threshold=threshold)
    if name == "ternary":
        return FormatSpec(name=name, bits=2)
    return None


def _even(count: int) -> int:
    return count + count % 2


def _spec(rows: int, columns: int, dtype: str) -> TensorSpec:
    return TensorSpec(shape=(rows, columns), dtype=dtype)
