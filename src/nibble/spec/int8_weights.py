"""INT8 weights that are trained: names, shapes, types and bytes of what stands for a matrix.

    codes [out, in] int8,   scales [out, ceil(in / 256)] float32        8.125 bits a weight

Groups of 256 lie inside a row (Q-GaLore, arXiv 2407.08296), so any rows of both tensors are valid
weights. Not the frozen `int8` of spec/formats.py, which has one scale a row and outlier columns.
"""

from __future__ import annotations

from nibble.spec.formats import TensorSpec

GROUP = 256


def int8_weight_tensors(shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """The tensors of a weight of `shape` (out, in), by name."""
    rows, columns = shape
    return {
        "codes": TensorSpec(shape=shape, dtype="int8"),
        "scales": TensorSpec(shape=(rows, -(-columns // GROUP)), dtype="float32"),
    }
