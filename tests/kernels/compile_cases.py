"""Compiles kernels for an H100 without having one; run by test_compile.py in a process of its own.

The interpreter runs kernels as Python and takes programs that the compiler refuses: a variable that
changes its shape in a loop, a product whose result has another type, tiles beyond shared memory.
"""

from __future__ import annotations

import sys
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from nibble.kernels import alibi_attention, balancing, gate, int8, int8_weights

SHARED_MEMORY_BYTES = 227 << 10
HALF, WIDE, BYTE, INTEGER = "*bf16", "*fp32", "*i8", "*i32"

STRIDES = (2048 * 12288, 12288, 384, 128, 32 * 2048, 2048, 0)


def attention(kernel: Any, tile: alibi_attention.Tile, tensors: list[str]) -> tuple[Any, ...]:
    numbers = (2048, 32, 0.1, *STRIDES, True, 128, 128, tile.queries, tile.keys)
    return kernel, tensors, numbers, tile.num_warps, tile.num_stages


def product(tile: int8.Tile) -> tuple[Any, ...]:
    tensors = [BYTE, BYTE, HALF, WIDE, WIDE, HALF, INTEGER, HALF]
    sizes = (4096, 12288, 4096, True, True, int8.OUTLIERS, int8.SWATH, True)
    numbers = (*sizes, tile.tokens, tile.features, tile.depth)
    return int8._product_kernel, tensors, numbers, tile.num_warps, tile.num_stages


FINISH = [INTEGER, BYTE, BYTE, HALF, WIDE, WIDE, HALF, INTEGER, HALF]
FINISHED = (4096, 12288, 4096, 12288, True, True, int8.OUTLIERS)
CASES: list[tuple[Any, ...]] = [
    attention(
        alibi_attention._forward_kernel, alibi_attention.FORWARD, [HALF, HALF, HALF, HALF, WIDE]
    ),
    attention(
        alibi_attention._by_query_kernel,
        alibi_attention.BY_QUERY,
        [HALF, HALF, HALF, HALF, HALF, WIDE, HALF, WIDE],
    ),
    attention(
        alibi_attention._by_key_kernel,
        alibi_attention.BY_KEY,
        [HALF, HALF, HALF, HALF, WIDE, HALF, WIDE],
    ),
    product(int8.PRODUCT),
    product(int8.SMALL_PRODUCT),
    (
        *(int8._finish_kernel, FINISH, (*FINISHED, int8.FINISH.tokens, int8.FINISH.features)),
        *(int8.FINISH.num_warps, 3),
    ),
    (int8._round_kernel, [HALF, BYTE, WIDE, BYTE], (6.0, 16384, 2, 8192), 8, 3),
    (int8_weights._decode_kernel, [BYTE, WIDE, HALF], (4096, 11008, 43, 8, 256), 4, 3),
    (
        balancing._over_columns_kernel,
        [HALF, WIDE, WIDE],
        (4096, 11008, *balancing.OVER_COLUMNS),
        4,
        3,
    ),
    (
        *(balancing._over_rows_kernel, [HALF, WIDE, WIDE]),
        *((4096, 11008, 23, 192, *balancing.OVER_ROWS), 4, 3),
    ),
    (balancing._add_parts_kernel, [WIDE, WIDE], (23, 4096, balancing.ADDED), 2, 3),
    (
        balancing._round_kernel,
        [HALF, WIDE, WIDE, WIDE, WIDE],
        *((4096, 11008, 16, balancing.NOTHING, 1, 16384), 16, 3),
    ),
    (
        balancing._add_and_invert_kernel,
        [WIDE, WIDE, WIDE],
        *((256, 4096, balancing.NOTHING, balancing.ADDED_PARTS, balancing.ADDED_COLUMNS), 4, 3),
    ),
    (balancing._inverse_kernel, [WIDE, WIDE], (4096, balancing.NOTHING, balancing.INVERTED), 4, 3),
    (balancing._scale_kernel, [HALF, WIDE, WIDE], (4096, 11008, *balancing.SCALED), 4, 3),
    (int8._list_kernel, [BYTE, INTEGER], (16384, 16384, 8, int8.LISTING_COLUMNS), 4, 3),
    *(
        (gate._gate_backward_kernel, [HALF] * 3, (64, 4096, 4096, 4096, kind, False, 2, 1024), 4, 3)
        for kind in gate.KINDS.values()
    ),
]


def compiled(
    kernel: Any, tensors: list[str], numbers: tuple[Any, ...], num_warps: int, num_stages: int
) -> Any:
    """The binary for compute capability 9.0."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, (parameter, value) in enumerate(
        zip(kernel.params, [*tensors, *numbers], strict=True)
    ):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
            continue
        is_tensor = index < len(tensors)
        signature[name] = value if is_tensor else "fp32" if isinstance(value, float) else "i32"
        if is_tensor or (isinstance(value, int) and value % 16 == 0):
            hints[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options)


if __name__ == "__main__":
    for case in CASES:
        binary = compiled(*case)
        name, shared = case[0].__name__, binary.metadata.shared
        assert shared <= SHARED_MEMORY_BYTES, f"{name} wants {shared} bytes of shared memory"
        uses = "wgmma" if "wgmma.mma_async" in binary.asm["ptx"] else ""
        sys.stdout.write(f"{name} {shared} {uses}\n")
